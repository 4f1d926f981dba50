// paged_attention: (mostly causal) attention of any mix of prefill chunks and decode rows in one call.
//
// A tile is a few neighboring queries of one sequence x the heads of a group, for one or more KV
// heads. It walks spans of kSpan positions, aligned at multiples of kSpan from position 0. Within a
// span: scores of all positions, block by block; one softmax; the mix of values, block by block.
// Spans are joined in the order of position (as in online softmax, arXiv 1805.02867), by the tile
// itself or, if there are fewer tiles than threads, from partial results.
//
// Invariant: one chain of fma per score (over the head's elements) and per mixed value of a span
// (over positions), lanes assigned by absolute position, spans joined in order. A masked key adds
// exactly zero and a span a row cannot see is passed over, so a row's value depends neither on the
// tile it is in, nor on who computed which span, nor on how the sequence was cut into chunks.
#include "attention_block.h"

namespace HR_NS {

namespace {

constexpr int kSpan = 512;                // positions of one softmax
constexpr int kScoreStride = kSpan + 16;  // rows must not share the sets of a cache
constexpr int kTileRows = 96;
constexpr int kDirectRows = 12;   // up to here values are widened in registers, once per 6 rows
constexpr float kNothing = -1e30f;  // a maximum before any key was seen

// ---- softmax ------------------------------------------------------------------------------------

// exp(x) of simd.h for x <= 0: the same polynomial, less to take care of.
HR_INLINE vf exp_down(vf x) {
  const vf low = set(-87.3365f), magic = set(12582912.0f);
  const vf kept = max(low, x);
  const vf shifted = fma(kept, set(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, set(-0.693359375f), kept);
  r = fma(n, set(2.12194440e-4f), r);
  vf p = fma(r, set(1.3981999e-3f), set(8.3334519e-3f));
  p = fma(p, r, set(4.1665795e-2f));
  p = fma(p, r, set(1.6666666e-1f));
  p = fma(p, r, set(0.5f));
  p = fma(p, r * r, r) + set(1.0f);
  const vf y = (vf)((vi)p + ((vi)shifted << 23));
#if HR_LEVEL >= 2
  return (vf)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ),
                                 (__m512)y);
#else
  return select(x < low, zero(), y);
#endif
}

// Combines all lanes in a fixed order, halves with halves.
template <class Pair>
HR_INLINE float fold(vf x, const Pair& pair) {
  vi other;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ half;
    x = pair(x, __builtin_shuffle(x, other));
  }
  return x[0];
}

// What a row has seen: the largest score, the sum of weights relative to it. Its mix is elsewhere.
struct Seen {
  float most;
  float total;
};

// The positions of a span, relative to its begin, that one row sees; none if low > high.
struct Sight {
  int64_t low, high;
};

// scores[first .. end) of one row become weights; positions out of sight get 0. `scales` of keys
// and values may be null.
static Seen weigh(float* scores, int64_t first, int64_t end, Sight sight, float soft_cap,
                  const float* key_scales, const float* value_scales) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const vi low = set_int(static_cast<int32_t>(sight.low));
  const vi high = set_int(static_cast<int32_t>(sight.high));
  vf most = set(kNothing);
  for (int64_t j = first; j < end; j += kLanes) {
    vf s = load(scores + j);
    const bool whole = j >= sight.low && j + kLanes - 1 <= sight.high;
    if (key_scales) s = s * load(key_scales + j);
    if (soft_cap > 0) s = set(soft_cap) * tanh(s * set(1 / soft_cap));
    if (!whole) {
      const vi at = lane + static_cast<int32_t>(j);
      s = select((at >= low) & (at <= high), s, set(-__builtin_inff()));
    }
    if (key_scales || soft_cap > 0 || !whole) store(scores + j, s);
    most = max(most, s);
  }
  const float top = fold(most, [](vf a, vf b) { return max(a, b); });
  vf total = zero();
  for (int64_t j = first; j < end; j += kLanes) {
    vf weight = exp_down(load(scores + j) - set(top));
    total = total + weight;
    if (value_scales) weight = weight * load(value_scales + j);
    store(scores + j, weight);
  }
  return {top, fold(total, [](vf a, vf b) { return a + b; })};
}

// Adds what a row saw in a span to what it saw before.
static void join(Seen& seen, float* mix, const Seen& span, const float* span_mix, int64_t width) {
  const float top = seen.most > span.most ? seen.most : span.most;
  const float before = exp(set(seen.most - top))[0], now = exp(set(span.most - top))[0];
  seen.total = seen.total * before + span.total * now;
  seen.most = top;
  for (int64_t d = 0; d < width; d += kLanes) {
    store(mix + d, fma(load(mix + d), set(before), load(span_mix + d) * set(now)));
  }
}

// ---- one tile -----------------------------------------------------------------------------------

// Positions [first, last] of the span that begins at `begin`, relative to it, and where they are.
struct Span {
  int64_t begin;
  int64_t first, last;      // last < 0: nothing of it is read
  int64_t offsets[kSpan + kNear];   // in bytes; in blocks that are read, positions that are not repeat one
  int64_t heads[kSpan];     // in KV heads
};

struct Tile {
  int64_t chunk;
  int64_t first, count;       // queries of the chunk
  int64_t first_head, heads;  // KV heads
  int64_t first_span, last_span;
  float* partial;  // where spans go one by one, instead of into the output
};

// Rows of a register tile; `newest` is the position of the last one.
struct Group {
  int64_t row, rows, newest;
};

struct Shape {
  int64_t group, dim, width, record;

  explicit Shape(const hr_attention_args& args) {
    group = args.heads / args.kv_heads;
    dim = args.q.columns / args.heads;
    width = (dim + kLanes - 1) / kLanes * kLanes;
    record = width + kLanes;  // of a partial result: what was seen, then the mix
  }
};

// How elements of one type are read from a cache. A table: all else is compiled once for all types.
struct Elements {
  int64_t size;  // bytes of one
  decltype(&transpose_keys<float>) transpose_keys;
  decltype(&widen_values<float>) widen_values;
  decltype(&multiply_values<float>) multiply_values;
};
template <class T>
constexpr Elements kElements = {sizeof(T), transpose_keys<T>, widen_values<T>, multiply_values<T>};

class Walk {
 public:
  Walk(const Elements& elements, const hr_attention_args& args, const hr_step& step)
      : elements_(elements), args_(args), step_(step), shape_(args), dim_(shape_.dim),
        width_(shape_.width) {}

  void run(const Tile& tile) {
    start(tile);
    const int64_t oldest = position(0), newest = position(rows_ - 1);
    const int64_t low = args_.window > 0 && oldest >= args_.window ? oldest - args_.window + 1 : 0;
    find(tile.first_span * kSpan, low, newest, spans_[0]);
    int turn = 0;
    for (int64_t s = tile.first_span; s <= tile.last_span; ++s, turn = 1 - turn) {
      Span& next = spans_[1 - turn];
      find((s + 1) * kSpan, low, s < tile.last_span ? newest : -1, next);
      score(spans_[turn]);
      weigh_rows(spans_[turn]);
      mix(spans_[turn], next);
      if (tile.partial) {
        keep(tile.partial + (s - tile.first_span) * heads_ * rows_ * shape_.record);
      } else {
        join_rows();
      }
    }
    if (!tile.partial) finish();
  }

  // The tile's output from the partial results of `spans` spans.
  void collect(const Tile& tile, const float* partial, int64_t spans) {
    start(tile);
    for (int64_t s = 0; s < spans; ++s) {
      for (int64_t r = 0; r < heads_ * rows_; ++r, partial += shape_.record) {
        const Seen span = {partial[0], partial[1]};
        if (span.most > kNothing) {
          join(seen_[r], mixes_ + r * width_, span, partial + kLanes, width_);
        }
      }
    }
    finish();
  }

 private:
  // The last position that a row sees.
  int64_t position(int64_t row) const {
    return args_.both_ways ? position_ : position_ + row / shape_.group;
  }
  // Row r of a KV head is query r / group, head r % group of the KV head's group.
  int64_t head(int64_t h, int64_t r) const {
    return (first_head_ + h) * shape_.group + r % shape_.group;
  }

  void start(const Tile& tile) {
    const int64_t begin = step_.query_start[tile.chunk];
    token_ = begin + tile.first;
    const int64_t rest = step_.query_start[tile.chunk + 1] - token_;
    position_ = step_.context[tile.chunk] - (args_.both_ways ? 1 : rest);
    pages_ = step_.page_table + step_.rows[tile.chunk] * step_.page_stride;
    rows_ = tile.count * shape_.group;
    heads_ = tile.heads;
    first_head_ = tile.first_head;
    place_scratch();
    group_rows();
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t r = 0; r < rows_; ++r) start_row(h, r);
    }
  }

  void place_scratch() {
    const int64_t rows = heads_ * rows_;
    const int64_t floats = kBlock * kBlock + rows * (3 * width_ + kScoreStride);
    const int64_t bytes = floats * 4 + 2 * rows * static_cast<int64_t>(sizeof(Seen));
    panel_ = static_cast<float*>(hr::scratch(static_cast<size_t>(bytes), 0));
    queries_ = panel_ + kBlock * kBlock;
    mixes_ = queries_ + rows * width_;
    span_mixes_ = mixes_ + rows * width_;
    scores_ = span_mixes_ + rows * width_;
    seen_ = reinterpret_cast<Seen*>(scores_ + rows * kScoreStride);
    span_seen_ = seen_ + rows;
  }

  // Cuts the rows of a head into register tiles of about the same size.
  void group_rows() {
    groups_ = 0;
    for (int64_t r = 0; r < rows_;) {
      const int64_t rest = rows_ - r, tiles = (rest + kRegisterRows - 1) / kRegisterRows;
      const int64_t rows = tiles > 2 ? kRegisterRows : (rest + tiles - 1) / tiles;
      group_[groups_++] = {r, rows, position(r + rows - 1)};
      r += rows;
    }
  }

  void start_row(int64_t h, int64_t r) {
    const int64_t row = h * rows_ + r;
    const float sink = args_.sinks ? args_.sinks[head(h, r)] : kNothing;
    seen_[row] = sink > kNothing ? Seen{sink, 1} : Seen{kNothing, 0};
    float* query = queries_ + row * width_;
    load_row(args_.q, token_ + r / shape_.group, head(h, r) * dim_, dim_, query);
    const float scale = args_.scale * args_.key_scale;
    for (int64_t d = 0; d < dim_; ++d) query[d] *= scale;
    memset(mixes_ + row * width_, 0, static_cast<size_t>(width_) * 4);
  }

  // Positions [low, newest] of the span at `begin`.
  void find(int64_t begin, int64_t low, int64_t newest, Span& span) const {
    span.begin = begin;
    span.first = low > begin ? low - begin : 0;
    span.last = newest - begin < kSpan ? newest - begin : kSpan - 1;
    if (span.last < 0) return;
    const int32_t size = static_cast<int32_t>(args_.page_size);
    const int32_t at = static_cast<int32_t>(begin + span.first);
    int64_t page = at / size, inside = at % size, heads = 0;
    for (int64_t j = span.first; j <= span.last; ++page, inside = 0) {
      heads = (static_cast<int64_t>(pages_[page]) * size + inside) * args_.kv_heads;
      for (int64_t i = inside; i < size && j <= span.last; ++i, ++j, heads += args_.kv_heads) {
        span.heads[j] = heads;
        span.offsets[j] = heads * dim_ * elements_.size;
      }
    }
    const int64_t end = (span.last / kBlock + 1) * kBlock + kNear;
    for (int64_t j = span.last + 1; j < end; ++j) span.offsets[j] = span.offsets[span.last];
    for (int64_t j = span.first / kBlock * kBlock; j < span.first; ++j) {
      span.offsets[j] = span.offsets[span.first];
    }
  }

  const char* cache(const void* all, int64_t h) const {
    return static_cast<const char*>(all) + (first_head_ + h) * dim_ * elements_.size;
  }

  // All heads of the block that is read after the one at `at`; beyond the span's last it is the
  // first of `after` in cache `all_after`.
  Ahead ahead(const Span& span, int64_t at, const void* all, const Span& after,
              const void* all_after) const {
    const Span& s = at + kBlock <= span.last ? span : after;
    if (&s == &after) {
      at = after.first / kBlock * kBlock;
      all = all_after;
    } else {
      at += kBlock;
    }
    Ahead made;
    made.rows = cache(all, 0);
    made.offsets = s.offsets + at;
    made.left = s.last - at + 1 < kBlock ? s.last - at + 1 : kBlock;
    made.size = heads_ * dim_ * elements_.size;
    return made;
  }

  void score(const Span& span) {
    for (int64_t at = span.first / kBlock * kBlock; at <= span.last; at += kBlock) {
      Ahead next = ahead(span, at, args_.keys, span, args_.values);
      for (int64_t h = 0; h < heads_; ++h) score_block(span, at, h, next);
    }
  }

  void score_block(const Span& span, int64_t at, int64_t h, Ahead& next) {
    const int64_t first = span.first > at ? (span.first - at) / kLanes * kLanes : 0;
    const int64_t last = span.last - at < kBlock ? span.last - at : kBlock - 1;
    const Place place = {cache(args_.keys, h), span.offsets + at};
    for (int64_t d = 0; d < dim_; d += kBlock) {
      const int64_t depth = dim_ - d < kBlock ? dim_ - d : kBlock;
      elements_.transpose_keys(place, first, last, d, depth, panel_, next);
      for (const Group* g = group_; g < group_ + groups_; ++g) {
        const int64_t seen = g->newest - span.begin - at;
        if (seen < first) continue;
        const int64_t row = h * rows_ + g->row;
        multiply({queries_ + row * width_ + d, width_, panel_ + first, depth,
                  scores_ + row * kScoreStride + at + first, kScoreStride, d == 0},
                 g->rows, ((seen < last ? seen : last) - first) / kLanes + 1);
      }
    }
  }

  void weigh_rows(const Span& span) {
    const bool scaled = args_.key_scales != nullptr;
    alignas(64) float key_scales[kSpan] = {}, value_scales[kSpan] = {};
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t j = span.first; scaled && j <= span.last; ++j) {
        key_scales[j] = args_.key_scales[span.heads[j] + first_head_ + h];
        value_scales[j] = args_.value_scales[span.heads[j] + first_head_ + h];
      }
      for (const Group* g = group_; g < group_ + groups_; ++g) {
        const int64_t seen = g->newest - span.begin;
        const int64_t end = (seen < span.last ? seen : span.last) / kLanes * kLanes + kLanes;
        for (int64_t r = g->row; r < g->row + g->rows; ++r) {
          const int64_t row = h * rows_ + r, high = position(r) - span.begin;
          const int64_t low = args_.window > 0 ? high - args_.window + 1 : 0;
          Seen& out = span_seen_[row];
          out = {kNothing, 0};
          if (seen < span.first) continue;
          out = weigh(scores_ + row * kScoreStride, span.first / kLanes * kLanes, end,
                      {low > 0 ? low : 0, high}, args_.soft_cap, scaled ? key_scales : nullptr,
                      scaled ? value_scales : nullptr);
        }
      }
    }
  }

  void mix(const Span& span, const Span& next) {
    const int64_t first_block = span.first / kBlock * kBlock;
    for (int64_t at = first_block; at <= span.last; at += kBlock) {
      Ahead after = ahead(span, at, args_.values, next, args_.keys);
      for (int64_t h = 0; h < heads_; ++h) mix_block(span, at, h, at == first_block, after);
    }
  }

  void mix_block(const Span& span, int64_t at, int64_t h, bool fresh, Ahead& next) {
    const int64_t first = span.first > at ? span.first - at : 0;
    const int64_t last = span.last - at < kBlock ? span.last - at : kBlock - 1;
    const Place place = {cache(args_.values, h), span.offsets + at};
    int64_t done = 0;
    if (rows_ <= kDirectRows) {
      done = dim_ / (kColumns * kLanes) * (kColumns * kLanes);
      mix_groups(span, at, h, [&](const Product& p, const Group& g) {
        elements_.multiply_values(p, place, g.rows, first, dim_, next);
      }, first, last, 0, fresh);
    }
    for (int64_t c = done; c < dim_; c += kBlock) {
      const int64_t count = dim_ - c < kBlock ? dim_ - c : kBlock;
      elements_.widen_values(place, first, last, c, count, panel_, next);
      mix_groups(span, at, h, [&](const Product& p, const Group& g) {
        multiply(p, g.rows, (count + kLanes - 1) / kLanes);
      }, first, last, c, fresh);
    }
  }

  // Calls body for each group that sees some of the positions [first, last] of the block at `at`.
  template <class Body>
  void mix_groups(const Span& span, int64_t at, int64_t h, const Body& body, int64_t first,
                  int64_t last, int64_t column, bool fresh) {
    for (const Group* g = group_; g < group_ + groups_; ++g) {
      const int64_t seen = g->newest - span.begin - at;
      if (seen < first) continue;
      const int64_t row = h * rows_ + g->row, depth = (seen < last ? seen : last) - first + 1;
      body({scores_ + row * kScoreStride + at + first, kScoreStride, panel_ + first * kBlock,
            depth, span_mixes_ + row * width_ + column, width_, fresh}, *g);
    }
  }

  void join_rows() {
    for (int64_t r = 0; r < heads_ * rows_; ++r) {
      if (span_seen_[r].most > kNothing) {
        join(seen_[r], mixes_ + r * width_, span_seen_[r], span_mixes_ + r * width_, width_);
      }
    }
  }

  void keep(float* partial) const {
    for (int64_t r = 0; r < heads_ * rows_; ++r, partial += shape_.record) {
      partial[0] = span_seen_[r].most;
      partial[1] = span_seen_[r].total;
      memcpy(partial + kLanes, span_mixes_ + r * width_, static_cast<size_t>(width_) * 4);
    }
  }

  void finish() {
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t row = h * rows_ + r;
        float* mix = mixes_ + row * width_;
        const vf share = set(args_.value_scale / seen_[row].total);
        for (int64_t d = 0; d < width_; d += kLanes) store(mix + d, load(mix + d) * share);
        store_row(args_.out, token_ + r / shape_.group, head(h, r) * dim_, dim_, mix);
      }
    }
  }

  const Elements& elements_;
  const hr_attention_args& args_;
  const hr_step& step_;
  const Shape shape_;
  const int64_t dim_, width_;
  // Of the tile.
  int64_t token_ = 0, position_ = 0, rows_ = 0, heads_ = 0, first_head_ = 0, groups_ = 0;
  const int32_t* pages_ = nullptr;
  Group group_[kTileRows];
  // Rows of all heads, head after head.
  float *panel_ = nullptr, *queries_ = nullptr, *scores_ = nullptr;
  float *mixes_ = nullptr, *span_mixes_ = nullptr;
  Seen *seen_ = nullptr, *span_seen_ = nullptr;
  Span spans_[2];
};

// ---- tasks --------------------------------------------------------------------------------------

// The queries of a tile: `count` from `first` on of a chunk, and the spans they see.
struct Piece {
  int32_t chunk, first, count;
  int32_t first_span, spans;
};

static Piece make_piece(const hr_attention_args& args, const hr_step& step, int64_t chunk,
                        int64_t first, int64_t queries) {
  const int64_t all = step.query_start[chunk + 1] - step.query_start[chunk], rest = all - first;
  const int64_t count = rest < queries ? rest : queries;
  const int64_t oldest = step.context[chunk] - (args.both_ways ? 1 : rest);
  const int64_t newest = args.both_ways ? oldest : oldest + count - 1;
  const int64_t low = args.window > 0 && oldest >= args.window ? oldest - args.window + 1 : 0;
  return {static_cast<int32_t>(chunk), static_cast<int32_t>(first), static_cast<int32_t>(count),
          static_cast<int32_t>(low / kSpan), static_cast<int32_t>(newest / kSpan - low / kSpan + 1)};
}

// Tiles of the step in roughly falling order of work; returns their number.
static int64_t order_pieces(const hr_attention_args& args, const hr_step& step, int64_t queries,
                            Piece* pieces) {
  int64_t start[33] = {}, made = 0;
  // Counting sort of chunks by the number of bits of their context.
  auto bucket = [&](int64_t chunk) {
    return __builtin_clz(static_cast<uint32_t>(step.context[chunk]) | 1);
  };
  auto tiles = [&](int64_t chunk) {
    return (step.query_start[chunk + 1] - step.query_start[chunk] + queries - 1) / queries;
  };
  for (int64_t chunk = 0; chunk < step.chunks; ++chunk) {
    start[bucket(chunk) + 1] += tiles(chunk);
    made += tiles(chunk);
  }
  for (int i = 0; i < 32; ++i) start[i + 1] += start[i];
  for (int64_t chunk = 0; chunk < step.chunks; ++chunk) {
    int64_t& at = start[bucket(chunk)];
    for (int64_t tile = tiles(chunk) - 1; tile >= 0; --tile) {
      pieces[at++] = make_piece(args, step, chunk, tile * queries, queries);
    }
  }
  return made;
}

// How the step is cut: item i is part i % parts (of the KV heads) of piece i / parts.
struct Cut {
  const Piece* pieces;
  int64_t items, parts, heads;  // `heads` KV heads per part

  Tile tile(int64_t item) const {
    const Piece& p = pieces[item / parts];
    return {p.chunk, p.first, p.count, item % parts * heads, heads, p.first_span,
            p.first_span + p.spans - 1, nullptr};
  }
};

// Every item by itself. Small ones go several at a time: about 2^17 multiplications are worth
// handing over.
static void run_items(const Elements& elements, const hr_attention_args& args, const hr_step& step,
                      const Cut& cut) {
  int64_t pairs = 0;
  for (int64_t chunk = 0; chunk < step.chunks; ++chunk) {
    pairs += static_cast<int64_t>(step.context[chunk]) *
             (step.query_start[chunk + 1] - step.query_start[chunk]);
  }
  const int64_t each = 1 + pairs * 2 * args.q.columns / (cut.items + 1);
  hr::parallel(cut.items, 1 + (1 << 17) / each, [&](int64_t begin, int64_t end) {
    Walk walk(elements, args, step);
    for (int64_t i = begin; i < end; ++i) walk.run(cut.tile(i));
  });
}

// Every span of every item by itself, then what they make together.
static void run_spans(const Elements& elements, const hr_attention_args& args, const hr_step& step,
                      const Cut& cut, int64_t spans) {
  const Shape shape(args);
  struct Share {
    int64_t item, span;
    float* partial;
  };
  const size_t room = static_cast<size_t>(spans * cut.parts) * sizeof(Share);
  Share* shares = static_cast<Share*>(hr::scratch(room, 1));
  int64_t count = 0, floats = 0;
  for (int64_t i = 0; i < cut.items; ++i) {
    const Piece& piece = cut.pieces[i / cut.parts];
    for (int64_t s = 0; s < piece.spans; ++s) {
      shares[count++] = {i, s, reinterpret_cast<float*>(floats * 4)};
      floats += piece.count * shape.group * cut.heads * shape.record;
    }
  }
  char* partials = static_cast<char*>(hr::scratch(static_cast<size_t>(floats) * 4, 2));
  for (int64_t i = 0; i < count; ++i) {
    shares[i].partial = reinterpret_cast<float*>(
        partials + reinterpret_cast<intptr_t>(shares[i].partial));
  }
  hr::parallel(count, 1, [&](int64_t begin, int64_t end) {
    Walk walk(elements, args, step);
    for (int64_t i = begin; i < end; ++i) {
      Tile tile = cut.tile(shares[i].item);
      tile.first_span = tile.last_span = tile.first_span + shares[i].span;
      tile.partial = shares[i].partial;
      walk.run(tile);
    }
  });
  Walk walk(elements, args, step);
  for (int64_t i = 0; i < count; ++i) {
    const Tile tile = cut.tile(shares[i].item);
    if (shares[i].span == 0) {
      walk.collect(tile, shares[i].partial, tile.last_span - tile.first_span + 1);
    }
  }
}

}  // namespace

static void attend(const Elements& elements, const hr_attention_args& args, const hr_step& step) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t queries = group < kTileRows ? kTileRows / group : 1;
  const size_t room = static_cast<size_t>(step.tokens + step.chunks) * sizeof(Piece);
  Piece* pieces = static_cast<Piece*>(hr::scratch(room, 3));
  const int64_t made = order_pieces(args, step, queries, pieces);
  // Heads of a position are neighbors in memory: with tiles enough for all threads, one task reads
  // them all; with few tiles or many queries, each takes some or one.
  const int64_t wanted = 4 * hr::threads();
  int64_t parts = step.tokens <= 2 * made ? 1 : args.kv_heads;
  while (parts < args.kv_heads && (made * parts < wanted || args.kv_heads % parts)) ++parts;
  int64_t spans = 0;
  for (int64_t i = 0; i < made; ++i) spans += pieces[i].spans;
  const Cut cut = {pieces, made * parts, parts, args.kv_heads / parts};
  if (hr::threads() > 1 && cut.items < wanted && spans > made) {
    run_spans(elements, args, step, cut, spans);
  } else {
    run_items(elements, args, step, cut);
  }
}

static void paged_attention(const hr_attention_args& args, const hr_step& step) {
  with_cache_type(args.cache_dtype, [&](auto type) {
    attend(kElements<decltype(type)>, args, step);
  });
}

HR_OPERATOR(paged_attention, hr_attention_args)

}  // namespace HR_NS
