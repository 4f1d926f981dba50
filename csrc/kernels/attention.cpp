// paged_attention: causal attention of any mix of prefill chunks and decode rows in one call.
//
// A task is a tile of query rows (neighboring queries x the heads of a group) of one or all KV
// heads. It walks blocks of kBlock positions, aligned at multiples of kBlock from position 0, and
// keeps a running maximum, sum and mix per row (online softmax, arXiv 1805.02867). K of a block is
// transposed once per tile, so scores and mixes are both sums of outer products.
//
// Invariant: one chain of fma per score (over the head's elements) and per mixed value (over
// positions, rescaled between blocks), lanes assigned by absolute position. A masked key adds
// exactly zero and a block a row cannot see multiplies by exactly one, so a row's value depends
// neither on the tile it is in nor on how the sequence was cut into chunks.
#include "types.h"

namespace HR_NS {

namespace {

constexpr int kBlock = 64;  // positions
constexpr int kBlockVectors = kBlock / kLanes;
constexpr int kTileRows = 48;
constexpr int kMostDim = HR_MOST_HEAD_DIM;
constexpr int kColumns = HR_LEVEL >= 2 ? 4 : 2;  // vectors of a register tile
constexpr int kRegisterRows = 6;
constexpr int64_t kDepth = 64;  // products of a register tile between visits to memory
constexpr float kNothing = -1e30f;               // a running maximum before any key was seen

// ---- sums of outer products ---------------------------------------------------------------------

// c[i][n] += sum over k of a[i][k] * b[k][n], in the order of k, for R rows and N vectors of n.
template <int R, int N>
HR_INLINE void outer(const float* a, int64_t a_stride, int64_t depth, const float* const* b,
                     int64_t first, float* c, int64_t c_stride) {
  vf sums[R][N];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[i][n] = load(c + i * c_stride + n * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = b[k] + first;
    vf right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load(row + n * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const vf left = set(a[i * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[i][n] = fma(left, right[n], sums[i][n]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + i * c_stride + n * kLanes, sums[i][n]);
  }
}

template <int N>
static void outer_rows(const float* a, int64_t a_stride, int64_t depth, const float* const* b,
                       int64_t first, float* c, int64_t c_stride, int64_t rows) {
  int64_t i = 0;
  for (; i + kRegisterRows <= rows; i += kRegisterRows) {
    outer<kRegisterRows, N>(a + i * a_stride, a_stride, depth, b, first, c + i * c_stride,
                            c_stride);
  }
  a += i * a_stride;
  c += i * c_stride;
  switch (rows - i) {
    case 5:
      return outer<5, N>(a, a_stride, depth, b, first, c, c_stride);
    case 4:
      return outer<4, N>(a, a_stride, depth, b, first, c, c_stride);
    case 3:
      return outer<3, N>(a, a_stride, depth, b, first, c, c_stride);
    case 2:
      return outer<2, N>(a, a_stride, depth, b, first, c, c_stride);
    case 1:
      return outer<1, N>(a, a_stride, depth, b, first, c, c_stride);
  }
}

// The same for `rows` rows and vectors [first, vectors) of b and c. What of b is in use at a time
// fits the L1 cache.
static void multiply(const float* a, int64_t a_stride, int64_t depth, const float* const* b,
                     float* c, int64_t c_stride, int64_t rows, int64_t first, int64_t vectors) {
  for (int64_t k = 0; k < depth; k += kDepth, a += kDepth, b += kDepth) {
    const int64_t some = depth - k < kDepth ? depth - k : kDepth;
    int64_t n = first;
    for (; n + kColumns <= vectors; n += kColumns) {
      outer_rows<kColumns>(a, a_stride, some, b, n * kLanes, c + n * kLanes, c_stride, rows);
    }
    const int64_t at = n * kLanes;
    if (vectors - n == 3) outer_rows<3>(a, a_stride, some, b, at, c + at, c_stride, rows);
    if (vectors - n == 2) outer_rows<2>(a, a_stride, some, b, at, c + at, c_stride, rows);
    if (vectors - n == 1) outer_rows<1>(a, a_stride, some, b, at, c + at, c_stride, rows);
  }
}

// ---- blocks of keys and values ------------------------------------------------------------------

// kLanes vectors as rows of a square become its columns: log2(kLanes) perfect shuffles.
HR_INLINE void transpose(vf* rows) {
  vi low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i & 1) * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    vf mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

// Positions [first, last] of the block that begins at `begin`: where their elements are in a cache.
struct Block {
  int64_t begin;  // a multiple of kBlock
  int64_t first, last;
  int64_t offsets[kBlock];
};

// fp32 rows of `width` elements (whole vectors) with the block's part of a cache: the cache's own
// rows if they are that, else copies in `space`. Rows of a cache lie far apart, in few sets of the
// CPU's caches: to read them often, `copy` them.
template <class T>
static void widen_block(const T* cache, const Block& block, int64_t dim, int64_t width, bool,
                        float* space, const float** rows) {
  for (int64_t j = block.first; j <= block.last; ++j) {
    const T* from = cache + block.offsets[j];
    float* to = space + j * width;
    rows[j] = to;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
    if (d < dim) store(to + d, load_part(from + d, dim - d));
  }
}
static void widen_block(const float* cache, const Block& block, int64_t dim, int64_t width,
                        bool copy, float* space, const float** rows) {
  if (copy || width != dim) {
    return widen_block<float>(cache, block, dim, width, copy, space, rows);
  }
  for (int64_t j = block.first; j <= block.last; ++j) rows[j] = cache + block.offsets[j];
}

// columns[d][lane] = rows[lane][d] for the vectors of lanes that hold any of the block.
static void transpose_rows(const float* const* rows, const Block& block, int64_t width,
                           float* columns) {
  const float* nothing = columns + kBlock * width;  // zeros, `width` of them
  for (int64_t lane = block.first / kLanes * kLanes; lane <= block.last; lane += kLanes) {
    const float* from[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      from[i] = lane + i >= block.first && lane + i <= block.last ? rows[lane + i] : nothing;
    }
    for (int64_t d = 0; d < width; d += kLanes) {
      vf square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(from[i] + d);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(columns + (d + i) * kBlock + lane, square[i]);
    }
  }
}

// ---- one tile -----------------------------------------------------------------------------------

// What a row of the tile has seen so far, beside its mix.
struct Running {
  int64_t position;
  float most;
  float factor;  // of the last block
  vf total;
};

struct Tile {
  int64_t chunk;
  int64_t first_head, heads;  // KV heads
  int64_t first, count;       // queries of the chunk
};

// The largest lane; the order of comparing does not matter.
HR_INLINE float peak(vf x) {
  vi other;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ half;
    x = max(x, __builtin_shuffle(x, other));
  }
  return x[0];
}

// scores [kBlock] of one row -> weights; updates the row's maximum and sum.
static void weigh(float* scores, Running& row, int64_t begin, int64_t vectors, int64_t window,
                  float soft_cap) {
  const int64_t high = row.position - begin;
  const int64_t low = window > 0 ? high - window + 1 : 0;
  const bool whole = low <= 0 && high >= vectors * kLanes - 1;
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  vf most = set(row.most);
  vf kept[kBlockVectors];
  for (int64_t n = 0; n < vectors; ++n) {
    vf s = load(scores + n * kLanes);
    if (soft_cap > 0) s = set(soft_cap) * tanh(s * set(1 / soft_cap));
    if (!whole) {
      const vi at = lane + static_cast<int32_t>(n * kLanes);
      const vi seen = (at >= set_int(static_cast<int32_t>(low > 0 ? low : 0))) &
                      (at <= set_int(static_cast<int32_t>(high)));
      s = select(seen, s, set(-__builtin_inff()));
    }
    kept[n] = s;
    most = max(most, s);
  }
  const float top = peak(most);
  row.factor = top == row.most ? 1.0f : exp(set(row.most - top))[0];
  vf total = row.total * set(row.factor);
  for (int64_t n = 0; n < vectors; ++n) {
    const vf weight = exp(kept[n] - set(top));
    store(scores + n * kLanes, weight);
    total = total + weight;
  }
  row.most = top;
  row.total = total;
}

template <class T>
class Walk {
 public:
  Walk(const hr_attention_args& args, const hr_step& step) : args_(args), step_(step) {
    group_ = args.heads / args.kv_heads;
    dim_ = args.q.columns / args.heads;
    width_ = (dim_ + kLanes - 1) / kLanes * kLanes;
  }

  void run(const Tile& tile) {
    rows_ = tile.count * group_;
    place_scratch(tile.heads);
    for (int64_t head = 0; head < tile.heads; ++head) {
      take(tile, head);
      start(tile);
    }
    const int64_t newest = running_[rows_ - 1].position, oldest = running_[0].position;
    const int64_t low = args_.window > 0 && oldest >= args_.window ? oldest - args_.window + 1 : 0;
    Block blocks[2];
    find(tile, low / kBlock * kBlock, low, newest, blocks[0]);
    for (int i = 0; blocks[i].last >= 0; i = 1 - i) {
      find(tile, blocks[i].begin + kBlock, low, newest, blocks[1 - i]);
      for (int64_t head = 0; head < tile.heads; ++head) {
        take(tile, head);
        visit(blocks[i], blocks[1 - i]);
      }
    }
    for (int64_t head = 0; head < tile.heads; ++head) {
      take(tile, head);
      finish(tile);
    }
  }

 private:
  void place_scratch(int64_t heads) {
    const int64_t rows = heads * rows_;
    const int64_t floats = 2 * rows * width_ + rows_ * kBlock + (3 * kBlock + 1) * width_;
    const int64_t bytes = floats * 4 + rows * static_cast<int64_t>(sizeof(Running));
    all_running_ = static_cast<Running*>(hr::scratch(static_cast<size_t>(bytes), 0));
    all_queries_ = reinterpret_cast<float*>(all_running_ + rows);
    all_mixes_ = all_queries_ + rows * width_;
    scores_ = all_mixes_ + rows * width_;
    wide_keys_ = scores_ + rows_ * kBlock;
    wide_values_ = wide_keys_ + kBlock * width_;
    columns_ = wide_values_ + kBlock * width_;
    memset(columns_ + kBlock * width_, 0, static_cast<size_t>(width_) * 4);
    for (int64_t d = 0; d < dim_; ++d) column_[d] = columns_ + d * kBlock;
  }

  // Turn to the tile's KV head number `head`.
  void take(const Tile& tile, int64_t head) {
    kv_head_ = tile.first_head + head;
    running_ = all_running_ + head * rows_;
    queries_ = all_queries_ + head * rows_ * width_;
    mix_ = all_mixes_ + head * rows_ * width_;
  }

  // Row r of the tile is query r / group, head r % group of the KV head's group.
  int64_t token(const Tile& tile, int64_t r) const {
    return step_.query_start[tile.chunk] + tile.first + r / group_;
  }
  int64_t column(int64_t r) const {
    return (kv_head_ * group_ + r % group_) * dim_;
  }

  void start(const Tile& tile) {
    const int64_t count = step_.query_start[tile.chunk + 1] - step_.query_start[tile.chunk];
    const int64_t position = step_.context[tile.chunk] - count + tile.first;
    for (int64_t r = 0; r < rows_; ++r) {
      const float* sinks = args_.sinks;
      const float sink = sinks ? sinks[kv_head_ * group_ + r % group_] : kNothing;
      Running& row = running_[r];
      row.position = position + r / group_;
      row.most = sink > kNothing ? sink : kNothing;
      row.factor = 1;
      row.total = zero();
      if (sinks) row.total[0] = 1;
      float* query = queries_ + r * width_;
      load_row(args_.q, token(tile, r), column(r), dim_, query);
      for (int64_t d = 0; d < dim_; ++d) query[d] *= args_.scale;
      memset(mix_ + r * width_, 0, static_cast<size_t>(width_) * 4);
    }
  }

  void visit(const Block& block, const Block& next) {
    const float* rows[kBlock];
    const T* keys = static_cast<const T*>(args_.keys) + kv_head_ * dim_;
    const T* values = static_cast<const T*>(args_.values) + kv_head_ * dim_;
    fetch(values, block);
    widen_block(keys, block, dim_, width_, false, wide_keys_, rows);
    transpose_rows(rows, block, width_, columns_);
    // Vectors before the first position read are masked, not computed.
    const int64_t skipped = block.first / kLanes, vectors = block.last / kLanes + 1;
    memset(scores_, 0, static_cast<size_t>(rows_ * kBlock) * 4);
    multiply(queries_, width_, dim_, column_, scores_, kBlock, rows_, skipped, vectors);
    fetch(keys, next);
    weigh_rows(block.begin, vectors);
    widen_block(values, block, dim_, width_, rows_ > 8, wide_values_, rows);
    multiply(scores_ + block.first, kBlock, block.last - block.first + 1, rows + block.first, mix_,
             width_, rows_, 0, width_ / kLanes);
  }

  // Ask for a block's part of a cache before it is needed.
  void fetch(const T* cache, const Block& block) const {
    for (int64_t j = block.first; j <= block.last; ++j) {
      const char* row = reinterpret_cast<const char*>(cache + block.offsets[j]);
      for (size_t at = 0; at < static_cast<size_t>(dim_) * sizeof(T); at += 64) prefetch(row + at);
    }
  }

  // Scores of all rows become weights; what was mixed so far shrinks to the new maximum.
  void weigh_rows(int64_t begin, int64_t vectors) {
    for (int64_t r = 0; r < rows_; ++r) {
      weigh(scores_ + r * kBlock, running_[r], begin, vectors, args_.window, args_.soft_cap);
      const float factor = running_[r].factor;
      if (factor == 1.0f) continue;
      float* mix = mix_ + r * width_;
      for (int64_t d = 0; d < width_; d += kLanes) store(mix + d, load(mix + d) * set(factor));
    }
  }

  // Where the positions [low, newest] of the block at `begin` are; last < 0 if there are none.
  void find(const Tile& tile, int64_t begin, int64_t low, int64_t newest, Block& block) const {
    const int64_t stride = args_.kv_heads * dim_;
    const int32_t* pages = step_.page_table + step_.rows[tile.chunk] * step_.page_stride;
    block.begin = begin;
    block.first = low > begin ? low - begin : 0;
    block.last = newest - begin < kBlock ? newest - begin : kBlock - 1;
    if (block.last < 0) return;
    const int32_t size = static_cast<int32_t>(args_.page_size);
    const int32_t position = static_cast<int32_t>(begin + block.first);
    int64_t page = position / size, inside = position % size;
    for (int64_t j = block.first; j <= block.last; ++page, inside = 0) {
      int64_t offset = (static_cast<int64_t>(pages[page]) * size + inside) * stride;
      for (int64_t i = inside; i < size && j <= block.last; ++i, ++j, offset += stride) {
        block.offsets[j] = offset;
      }
    }
  }

  void finish(const Tile& tile) {
    for (int64_t r = 0; r < rows_; ++r) {
      float* mix = mix_ + r * width_;
      const vf share = set(1.0f / sum(running_[r].total));
      for (int64_t d = 0; d < width_; d += kLanes) store(mix + d, load(mix + d) * share);
      store_row(args_.out, token(tile, r), column(r), dim_, mix);
    }
  }

  const hr_attention_args& args_;
  const hr_step& step_;
  int64_t group_, dim_, width_, rows_ = 0;
  int64_t kv_head_ = 0;
  // Of the head in turn, and of all heads of the tile.
  Running *running_ = nullptr, *all_running_ = nullptr;
  float *queries_ = nullptr, *all_queries_ = nullptr;
  float *mix_ = nullptr, *all_mixes_ = nullptr;
  float* scores_ = nullptr;
  float *wide_keys_ = nullptr, *wide_values_ = nullptr, *columns_ = nullptr;
  const float* column_[kMostDim];  // rows of columns_
};

// ---- tasks --------------------------------------------------------------------------------------

struct Piece {
  int32_t chunk, first;
};

// Query tiles of the step in roughly falling order of work; returns their number.
static int64_t order_pieces(const hr_step& step, int64_t queries, Piece* pieces) {
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
      pieces[at++] = {static_cast<int32_t>(chunk), static_cast<int32_t>(tile * queries)};
    }
  }
  return made;
}

}  // namespace

template <class T>
static void attend(const hr_attention_args& args, const hr_step& step) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t queries = group < kTileRows ? kTileRows / group : 1;
  const size_t room = static_cast<size_t>(step.tokens + step.chunks) * sizeof(Piece);
  Piece* pieces = static_cast<Piece*>(hr::scratch(room, 3));
  const int64_t made = order_pieces(step, queries, pieces);
  // Heads of a position are neighbors in memory: with tiles enough for all threads, one task reads
  // them all; otherwise each head is a task.
  const int64_t heads = made >= 4 * hr::threads() && step.tokens <= 2 * made ? args.kv_heads : 1;
  const int64_t parts = args.kv_heads / heads, count = made * parts;
  // Small contexts go several to a piece: about 2^17 multiplications are worth handing over.
  int64_t pairs = 0;
  for (int64_t chunk = 0; chunk < step.chunks; ++chunk) {
    pairs += static_cast<int64_t>(step.context[chunk]) *
             (step.query_start[chunk + 1] - step.query_start[chunk]);
  }
  const int64_t each = 1 + pairs * 2 * args.q.columns / (count + 1);
  hr::parallel(count, 1 + (1 << 17) / each, [&](int64_t begin, int64_t end) {
    Walk<T> walk(args, step);
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i / parts];
      const int64_t rest =
          step.query_start[piece.chunk + 1] - step.query_start[piece.chunk] - piece.first;
      walk.run({piece.chunk, i % parts * heads, heads, piece.first,
                rest < queries ? rest : queries});
    }
  });
}

static void paged_attention(const hr_attention_args& args, const hr_step& step) {
  if (args.cache_dtype == HR_F32) attend<float>(args, step);
  if (args.cache_dtype == HR_BF16) attend<bf16>(args, step);
  if (args.cache_dtype == HR_F16) attend<f16>(args, step);
}

HR_OPERATOR(paged_attention, hr_attention_args)

}  // namespace HR_NS
