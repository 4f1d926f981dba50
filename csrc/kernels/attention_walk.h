// One tile of attention: a few neighboring queries of one sequence x the heads of a group, for one
// or more KV heads. It walks spans of positions. Within a span: scores of all positions, step by
// step; one softmax; the mix of values, step by step. Few rows read the cache themselves
// (attention_direct.h), many share panels of it (attention_block.h). Part of the kernel files: the
// same rules as simd.h.
//
// Invariant: a score has one order over the head's elements, a mixed value one chain over the
// positions of a span, spans are joined in order, and all are the same for few and for many rows. A
// masked key adds exactly zero and a span a row cannot see is passed over, so a row's value is a
// function of its position and of the keys and values alone.
#pragma once
#include "attention_block.h"

namespace HR_NS {

namespace {

constexpr int kScoreStride = kSpan + 16;  // rows must not share the sets of a cache
constexpr int kTileRows = 192;
constexpr int kDirectRows = 12;  // from here on panels pay

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

// Of a head: elements of a key and of a value, which is all of it or its beginning, and both in
// whole vectors.
struct Shape {
  int64_t group, dim, vectors, width, value_dim, value_width, record;

  Shape(const hr_attention_args& args, int64_t (*vectors_of_dim)(int64_t)) {
    group = args.heads / args.kv_heads;
    dim = args.q.columns / args.heads;
    value_dim = args.out.columns / args.heads;
    vectors = vectors_of_dim(dim);
    width = vectors * kLanes;
    value_width = vectors_of_dim(value_dim) * kLanes;
    record = value_width + kLanes;  // of a partial result: what was seen, then the mix
  }
};

template <class T>
class Walk {
 public:
  Walk(const hr_attention_args& args, const hr_step& step)
      : args_(args),
        step_(step),
        shape_(args, vectors_of<T>),
        dim_(shape_.dim),
        width_(shape_.width),
        value_dim_(shape_.value_dim),
        value_width_(shape_.value_width),
        bytes_(dim_ * static_cast<int64_t>(sizeof(T))) {
    for (int i = 0; i < kStep; ++i) staged_offsets_[i] = i * width_ * kStagedBytes;
  }

  void run(const Tile& tile) {
    start(tile);
    const int64_t oldest = position(0), newest = position(rows_ - 1);
    const int64_t low = oldest_seen(args_, oldest);
    find_span(tile.first_span, low, newest, spans_[0]);
    int turn = 0;
    for (int64_t s = tile.first_span; s <= tile.last_span; ++s, turn = 1 - turn) {
      Span& next = spans_[1 - turn];
      find_span(s + 1, low, s < tile.last_span ? newest : -1, next);
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
          join(seen_[r], mixes_ + r * value_width_, span, partial + kLanes, value_width_);
        }
      }
    }
    finish();
  }

 private:
  typedef typename Staged<T>::type Near;
  static constexpr bool kStaged = sizeof(Near) != sizeof(T);
  static constexpr int64_t kStagedBytes = sizeof(Near);

  // The last position that a row sees.
  int64_t position(int64_t row) const {
    return args_.both_ways ? position_ : position_ + row / shape_.group;
  }
  // Row r of a KV head is query r / group, head r % group of the KV head's group.
  int64_t head(int64_t h, int64_t r) const {
    return (first_head_ + h) * shape_.group + r % shape_.group;
  }
  bool direct() const { return rows_ <= kDirectRows; }

  // ---- the tile's rows ----

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
    const int64_t rows = heads_ * rows_, columns = width_ > kBlock ? width_ : kBlock;
    const int64_t panel = kBlock * columns;
    const int64_t floats = panel + rows * (width_ + 2 * value_width_ + kScoreStride);
    const int64_t bytes = floats * 4 + 2 * rows * static_cast<int64_t>(sizeof(Seen));
    panel_ = static_cast<float*>(hr::scratch(static_cast<size_t>(bytes), 0));
    queries_ = panel_ + panel;
    mixes_ = queries_ + rows * width_;
    span_mixes_ = mixes_ + rows * value_width_;
    scores_ = span_mixes_ + rows * value_width_;
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
    memset(mixes_ + row * value_width_, 0, static_cast<size_t>(value_width_) * 4);
    alignas(64) float own[HR_MOST_HEAD_DIM + 2 * kLanes];
    load_row(args_.q, token_ + r / shape_.group, head(h, r) * dim_, dim_, own);
    memset(own + dim_, 0, static_cast<size_t>(width_ - dim_) * 4);
    const vf scale = set(args_.scale * (args_.key_scale * Wide<T>::meaning));
    for (int64_t d = 0; d < width_; d += kLanes) store(own + d, load(own + d) * scale);
    part<T>(own, width_, queries_ + row * width_);
  }

  void finish() {
    alignas(64) float own[HR_MOST_HEAD_DIM + 2 * kLanes];
    const float scale = args_.value_scale * Wide<T>::meaning;
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t row = h * rows_ + r;
        unite<T>(mixes_ + row * value_width_, value_width_, own);
        const vf share = set(scale / seen_[row].total);
        for (int64_t d = 0; d < value_width_; d += kLanes) store(own + d, load(own + d) * share);
        store_row(args_.out, token_ + r / shape_.group, head(h, r) * value_dim_, value_dim_, own);
      }
    }
  }

  // ---- the cache ----

  void find_span(int64_t span, int64_t low, int64_t newest, Span& out) const {
    find(args_, pages_, args_.kv_heads * bytes_, span * kSpan, low, newest, out);
  }

  const char* cache(const void* all, int64_t h) const {
    return static_cast<const char*>(all) + (first_head_ + h) * bytes_;
  }

  // All heads of the `size` positions that are read in the step after the next one, counted from
  // `at`: what is asked for last must have come when the first head is read. Beyond the span's last
  // they are of `after` in cache `all_after`.
  Ahead ahead(const Span& span, int64_t at, int64_t size, const void* all, const Span& after,
              const void* all_after) const {
    const int64_t next = at + 2 * size, beyond = next - (span.last / size + 1) * size;
    if (beyond < 0) return ahead_of(span, next, size, all);
    return ahead_of(after, after.first / size * size + beyond, size, all_after);
  }

  Ahead ahead_of(const Span& span, int64_t at, int64_t size, const void* all) const {
    const int64_t count = span.last - at + 1;
    return {cache(all, 0), span.offsets + at, count < size ? count : size, heads_ * bytes_};
  }

  // `dim` elements of the positions at `place` (kStep at most), widened half way where that pays.
  Place staged(const Place& place, int64_t positions, int64_t dim, Ahead& next) {
    if constexpr (kStaged) {
      Near* to = reinterpret_cast<Near*>(panel_);
      for (int64_t j = 0; j < positions; ++j) {
        stage(place.at<T>(j), dim, to + j * width_);
        next.lines(lines_of(dim * static_cast<int64_t>(sizeof(T))));
      }
      return {reinterpret_cast<const char*>(to), staged_offsets_};
    }
    return place;
  }

  // ---- scores ----

  void score(const Span& span) {
    const int64_t size = direct() ? kStep : kBlock;
    for (int64_t at = span.first / size * size; at <= span.last; at += size) {
      Ahead next = ahead(span, at, size, args_.keys, span, args_.values);
      for (int64_t h = 0; h < heads_; ++h) {
        if (direct()) {
          score_step(span, at, h, next);
        } else {
          score_block(span, at, h, next);
        }
      }
    }
  }

  void score_step(const Span& span, int64_t at, int64_t h, Ahead& next) {
    const Place place = staged({cache(args_.keys, h), span.offsets + at}, kStep, dim_, next);
    const int64_t row = h * rows_;
    const Queries queries = {queries_ + row * width_, width_, scores_ + row * kScoreStride + at,
                             kScoreStride};
    Ahead none;
    dot_rows<Near>(queries, rows_, place, dim_, kStaged ? none : next);
  }

  void score_block(const Span& span, int64_t at, int64_t h, Ahead& next) {
    const int64_t first = span.first > at ? (span.first - at) / kLanes * kLanes : 0;
    const int64_t last = span.last - at < kBlock ? span.last - at : kBlock - 1;
    transpose_keys<T>({cache(args_.keys, h), span.offsets + at}, first, last, dim_, panel_, next);
    // By halves, so that a panel fits the L1 cache.
    for (int64_t lane = 0; lane < kLanes; lane += kLanes / 2) {
      for (const Group* g = group_; g < group_ + groups_; ++g) {
        const int64_t seen = g->newest - span.begin - at;
        if (seen < first) continue;
        const int64_t row = h * rows_ + g->row;
        multiply({queries_ + row * width_ + lane, width_, kLanes,
                  panel_ + lane * shape_.vectors * kBlock + first, shape_.vectors,
                  scores_ + row * kScoreStride + at + first, kScoreStride, lane == 0, kLanes / 2},
                 g->rows, ((seen < last ? seen : last) - first) / kLanes + 1);
      }
    }
  }

  // ---- weights ----

  void weigh_rows(const Span& span) {
    const bool scaled = args_.key_scales != nullptr;
    Scales scales;
    const Scaling scaling = {args_.soft_cap, 0, scaled ? scales.keys : nullptr,
                             scaled ? scales.values : nullptr};
    for (int64_t h = 0; h < heads_; ++h) {
      if (scaled) read_scales(span, first_head_ + h, scales);
      for (const Group* g = group_; g < group_ + groups_; ++g) weigh_group(span, h, *g, scaling);
    }
  }

  struct Scales {
    alignas(64) float keys[kSpan];
    alignas(64) float values[kSpan];
  };

  // Those of whole vectors; positions that are not read get 0.
  void read_scales(const Span& span, int64_t head, Scales& scales) const {
    for (int64_t j = span.first; j <= span.last; ++j) {
      scales.keys[j] = args_.key_scales[span.heads[j] + head];
      scales.values[j] = args_.value_scales[span.heads[j] + head];
    }
    for (int64_t j = span.first; j-- % kLanes > 0;) scales.keys[j] = scales.values[j] = 0;
    for (int64_t j = span.last; ++j % kLanes > 0;) scales.keys[j] = scales.values[j] = 0;
  }

  void weigh_group(const Span& span, int64_t h, const Group& g, Scaling scaling) {
    const int64_t seen = g.newest - span.begin;
    const int64_t end = (seen < span.last ? seen : span.last) / kLanes * kLanes + kLanes;
    for (int64_t r = g.row; r < g.row + g.rows; ++r) {
      const int64_t row = h * rows_ + r, high = position(r) - span.begin;
      const int64_t low = oldest_seen(args_, position(r)) - span.begin;
      span_seen_[row] = {kNothing, 0};
      if (seen < span.first) continue;
      if (args_.slopes) scaling.slope = args_.slopes[head(h, r)];
      span_seen_[row] = weigh(scores_ + row * kScoreStride, span.first / kLanes * kLanes, end,
                              {low > 0 ? low : 0, high}, scaling);
    }
  }

  // ---- values ----

  void mix(const Span& span, const Span& next) {
    const int64_t size = direct() ? kStep : kBlock, begin = span.first / size * size;
    for (int64_t at = begin; at <= span.last; at += size) {
      Ahead after = ahead(span, at, size, args_.values, next, args_.keys);
      const int64_t first = span.first > at ? span.first - at : 0;
      const int64_t last = span.last - at < size ? span.last - at : size - 1;
      for (int64_t h = 0; h < heads_; ++h) {
        const Place place = {cache(args_.values, h), span.offsets + at + first};
        if (direct()) {
          const Place near = staged(place, last - first + 1, value_dim_, after);
          mix_step(span, at + first, h, near, last - first, at == begin, after);
        } else {
          mix_block(span, at + first, h, place, last - first, at == begin, after);
        }
      }
    }
  }

  // Positions at .. at + last of the span.
  void mix_step(const Span& span, int64_t at, int64_t h, const Place& place, int64_t last,
                bool fresh, Ahead& next) {
    Ahead none;
    for (const Group* g = group_; g < group_ + groups_; ++g) {
      const int64_t seen = g->newest - span.begin - at, row = h * rows_ + g->row;
      if (seen < 0) continue;
      const Mixing mixing = {scores_ + row * kScoreStride + at, kScoreStride,
                             (seen < last ? seen : last) + 1, span_mixes_ + row * value_width_,
                             value_width_, fresh};
      mix_rows<Near>(mixing, g->rows, place, value_dim_, kStaged ? none : next);
    }
  }

  void mix_block(const Span& span, int64_t at, int64_t h, const Place& place, int64_t last,
                 bool fresh, Ahead& next) {
    for (int64_t c = 0; c < value_dim_; c += kPanelColumns) {
      const int64_t count = value_dim_ - c < kPanelColumns ? value_dim_ - c : kPanelColumns;
      const int64_t vectors = vectors_of<T>(count);
      widen_values<T>(place, 0, last, c, count, panel_, next);
      for (const Group* g = group_; g < group_ + groups_; ++g) {
        const int64_t seen = g->newest - span.begin - at, row = h * rows_ + g->row;
        if (seen < 0) continue;
        multiply({scores_ + row * kScoreStride + at, kScoreStride, 1, panel_,
                  (seen < last ? seen : last) + 1, span_mixes_ + row * value_width_ + c,
                  value_width_, fresh, 0},
                 g->rows, vectors);
      }
    }
  }

  // ---- spans ----

  void join_rows() {
    for (int64_t r = 0; r < heads_ * rows_; ++r) {
      if (span_seen_[r].most > kNothing) {
        join(seen_[r], mixes_ + r * value_width_, span_seen_[r], span_mixes_ + r * value_width_,
             value_width_);
      }
    }
  }

  void keep(float* partial) const {
    for (int64_t r = 0; r < heads_ * rows_; ++r, partial += shape_.record) {
      partial[0] = span_seen_[r].most;
      partial[1] = span_seen_[r].total;
      memcpy(partial + kLanes, span_mixes_ + r * value_width_,
             static_cast<size_t>(value_width_) * 4);
    }
  }

  const hr_attention_args& args_;
  const hr_step& step_;
  const Shape shape_;
  const int64_t dim_, width_, value_dim_, value_width_;
  const int64_t bytes_;  // of a head's key; a value is as far from the next
  int64_t staged_offsets_[kStep];
  // Of the tile.
  int64_t token_ = 0, position_ = 0, rows_ = 0, heads_ = 0, first_head_ = 0, groups_ = 0;
  const int32_t* pages_ = nullptr;
  Group group_[512];
  // Rows of all heads, head after head.
  float *panel_ = nullptr, *queries_ = nullptr, *scores_ = nullptr;
  float *mixes_ = nullptr, *span_mixes_ = nullptr;
  Seen *seen_ = nullptr, *span_seen_ = nullptr;
  Span spans_[2];
};

}  // namespace

}  // namespace HR_NS
