// sample: edits of logits (penalties, bias, min_new_tokens), then the next token of each
// row. A row's token depends on its own logits and parameters, bit by bit: blocks of the vocabulary
// are cut at fixed places, sums run in the order of ids, noise is keyed by the row.
#include "vocab.h"

namespace HR_NS {
namespace {

// Rows without top-k look at about this many of the largest logits first.
constexpr int64_t kFirstLook = 64;
constexpr int64_t kDrawGrain = 1 << 13;  // logits worth another thread when drawing
constexpr int64_t kSearchGrain = 3;  // rows, when looking for the largest in a segment
constexpr int kRanges = 2048;
constexpr int64_t kManyTokens = 2048;  // worth counting on more than one thread
constexpr double kBelowOne = 1.0 - 0x1p-52;

// ---- edits --------------------------------------------------------------------------------------

// Tokens of a sequence with the number of times each is in the output: open addressing.
struct Counts {
  struct Entry {
    int32_t id;  // -1: empty
    int32_t count;
  };
  Entry* entries;
  int64_t size;
  int shift;

  explicit Counts(int64_t most) {
    int log = 4;
    while ((1ll << log) < 2 * most) ++log;
    size = 1ll << log;
    shift = 64 - log;
    const size_t bytes = static_cast<size_t>(size) * sizeof(Entry);
    entries = static_cast<Entry*>(hr::scratch(bytes, 1));
    memset(entries, 0xff, bytes);
  }

  void add(int32_t id, int32_t times) {
    uint64_t at = (static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15ull) >> shift;
    while (entries[at].id != id) {
      if (entries[at].id < 0) {
        entries[at] = {id, 0};
        break;
      }
      at = (at + 1) & static_cast<uint64_t>(size - 1);
    }
    entries[at].count += times;
  }
};

bool penalized(const hr_sample_row& row) {
  return row.repetition_penalty != 1.0f || row.frequency_penalty != 0.0f ||
         row.presence_penalty != 0.0f;
}

void penalize(float* x, const hr_sample_row& row, int64_t length) {
  const bool repeated = row.repetition_penalty != 1.0f;
  const int64_t first = repeated ? 0 : row.prompt_len;
  if (!penalized(row) || first >= length) return;
  Counts counts(length - first);
  for (int64_t i = first; i < length; ++i) counts.add(row.tokens[i], i >= row.prompt_len);
  for (int64_t i = 0; i < counts.size; ++i) {
    const Counts::Entry entry = counts.entries[i];
    if (entry.id < 0) continue;
    float value = x[entry.id];
    if (entry.count > 0) {
      value -= row.frequency_penalty * static_cast<float>(entry.count);
      value -= row.presence_penalty;
    }
    if (repeated) {
      value = value > 0 ? value / row.repetition_penalty : value * row.repetition_penalty;
    }
    x[entry.id] = value;
  }
}

void forbid(float* x, int64_t vocab, const int32_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] >= 0 && ids[i] < vocab) x[ids[i]] = -kInfinity;
  }
}

void edit(const hr_sample_args& args, int64_t index) {
  float* x = row_of<float>(args.logits, index);
  const hr_sample_row& row = args.table[args.rows[index]];
  const int64_t length = args.positions[index];
  penalize(x, row, length);
  for (int64_t i = 0; i < row.bias_count; ++i) x[row.bias_ids[i]] += row.bias[i];
  if (length - row.prompt_len < row.min_new_tokens) {
    forbid(x, args.logits.columns, args.eos, args.eos_count);
    forbid(x, args.logits.columns, row.stops, row.stop_count);
  }
}

// ---- draws --------------------------------------------------------------------------------------

// Uniform in [0, 1) with 52 bits: Philox 4x32-10 keyed by the seed, as headrace.core.noise.
double noise_of(const hr_sample_row& row, int64_t position) {
  uint32_t counter[4] = {static_cast<uint32_t>(position),
                         static_cast<uint32_t>(position >> 32),
                         static_cast<uint32_t>(row.sample_index), 0};
  uint32_t key[2] = {static_cast<uint32_t>(row.seed), static_cast<uint32_t>(row.seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = counter[0] * 0xD2511F53ull, b = counter[2] * 0xCD9E8D57ull;
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0];
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1];
    counter[1] = static_cast<uint32_t>(b);
    counter[3] = static_cast<uint32_t>(a);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const uint64_t bits = static_cast<uint64_t>(counter[0]) << 20 | counter[1] >> 12;
  return static_cast<double>(bits) * 0x1p-52;
}

// A row while its token is chosen. Tokens are kept by their logit, `cut` or more, and their weight,
// min_p or more, where weights are exp((x - top) / temperature) and hence at most 1.
struct Choice {
  const float* x;
  Blocks blocks;
  const hr_sample_row& row;
  int64_t position;
  float top;      // the largest logit
  float inverse;  // 1 / temperature

  int64_t token() const {
    if (row.temperature == 0) return greedy();
    if (needs_mass(row)) {
      const double mass = rescale(blocks, top, inverse);
      if (row.top_p >= 1) return draw(-kInfinity, mass);
      const float cut = cut_of_mass(row.top_p * mass, mass);
      return draw(cut, keep(cut));
    }
    const float cut = row.top_k > 0 ? cut_of_count() : -kInfinity;
    return draw(cut, keep(cut));
  }

  // The mass of all tokens is asked for: of top-p alone, or without any filter.
  static bool needs_mass(const hr_sample_row& row) {
    return row.temperature != 0 && row.top_k == 0 && (row.top_p < 1 || row.min_p <= 0);
  }

  int64_t greedy() const {
    int64_t b = 0;
    while (blocks.largest[b] != top) ++b;
    for (int64_t i = blocks.begin(b);; i += kLanes) {
      const uint32_t hits = bits_of(take_logits(x + i, blocks.vocab - i) == set(top));
      if (hits) return i + __builtin_ctz(hits);
    }
  }

  // A logit below which weights are less than `weight`, with room for rounding.
  float logit_at(double weight) const {
    return top + (logf(static_cast<float>(weight)) * 1.0001f - 1e-3f) / inverse;
  }

  // ---- top-k and top-p: the smallest logit that is kept ----

  // Weighs tokens with bound <= x < limit; returns them in the order of ids.
  Candidates weighed(float bound, float limit = kInfinity) const {
    const Candidates found = collect(x, blocks, bound, limit);
    alignas(64) float values[256];
    for (int64_t first = 0; first < found.count; first += 256) {
      Candidate* items = found.items + first;
      const int64_t n = found.count - first < 256 ? found.count - first : 256;
      for (int64_t i = 0; i < n; ++i) values[i] = items[i].x;
      weigh(values, n, top, inverse, values);
      for (int64_t i = 0; i < n; ++i) items[i].weight = values[i];
    }
    return found;
  }

  static float logit(const Candidate& c) { return c.x; }
  static double weight(const Candidate& c) { return c.weight; }
  static double one(const Candidate&) { return 1; }

  // With top-k; then top-p is a share of what that keeps.
  float cut_of_count() const {
    const Candidates found = weighed(bound_of(blocks, row.top_k));
    const int64_t count = row.top_k < found.count ? row.top_k : found.count;
    const float last =
        cut_at(found.items, found.count, static_cast<double>(count), logit, one);
    if (row.top_p >= 1) return last;
    // Of tokens that tie with the last one only as many count as belong to the first top_k.
    double mass = 0, tied = 0;
    int64_t more = count;
    for (int64_t i = 0; i < found.count; ++i) {
      const Candidate& item = found.items[i];
      mass += item.x > last ? item.weight : 0;
      more -= item.x > last;
      tied = item.x == last ? item.weight : tied;
    }
    mass += static_cast<double>(more) * tied;
    return cut_at(found.items, found.count, row.top_p * mass, logit, weight);
  }

  // Tokens above it weigh less than `limit`, a share of the mass of all.
  float cut_of_mass(double limit, double mass) const {
    // Tokens this unlikely are below it.
    const float floor = logit_at((mass - limit) / (2 * static_cast<double>(blocks.vocab)));
    for (int64_t rank = kFirstLook; rank <= blocks.count; rank *= 8) {
      const float bound = bound_of(blocks, rank);
      if (bound <= floor) break;
      const Candidates found = weighed(bound);
      double sum = 0;
      for (int64_t i = 0; i < found.count; ++i) sum += found.items[i].weight;
      if (sum >= limit) return cut_at(found.items, found.count, limit, logit, weight);
    }
    return cut_of_histogram(limit, floor);
  }

  // The one for all logits below the floor is kRanges + 1.
  int32_t range_of(float logit, float scale) const {
    const float range = (top - logit) * scale;
    return static_cast<int32_t>(range <= kRanges ? range : kRanges + 1.0f);
  }

  // The same for flat distributions: masses of narrow ranges of logits, then one range in detail.
  float cut_of_histogram(double limit, float floor) const {
    if (!(floor < top)) return top;
    double masses[kRanges + 2] = {};
    const float scale = kRanges / (top - floor);
    alignas(64) float weights[256];
    alignas(64) int32_t ranges[256];
    for (int64_t b = 0; b < blocks.count; ++b) {
      if (!(blocks.largest[b] >= floor)) continue;
      const float* own = x + blocks.begin(b);
      const int64_t count = blocks.end(b) - blocks.begin(b);
      weigh(own, count, top, inverse, weights);
      for (int64_t i = 0; i < count; ++i) ranges[i] = range_of(own[i], scale);
      for (int64_t i = 0; i < count; ++i) masses[ranges[i]] += weights[i];
    }
    int range = 0;
    double above = 0;
    for (; above + masses[range] < limit; ++range) {
      above += masses[range];
      if (range == kRanges) return floor;
    }
    // The ends are rounded, so look a little further and then again.
    Candidates found = weighed(top - static_cast<float>(range + 2) / scale,
                               range > 0 ? top - static_cast<float>(range - 1) / scale : kInfinity);
    int64_t count = 0;
    for (int64_t i = 0; i < found.count; ++i) {
      if (range_of(found.items[i].x, scale) == range) found.items[count++] = found.items[i];
    }
    return cut_at(found.items, count, limit - above, logit, weight);
  }

  // ---- the draw ----

  // Makes the sums of blocks those of kept tokens; returns their sum.
  double keep(float cut) const {
    float bound = cut;
    if (row.min_p > 0) {
      const float least = logit_at(row.min_p);
      bound = least > bound ? least : bound;
    }
    double total = 0;
    alignas(64) float weights[256];
    for (int64_t b = 0; b < blocks.count; ++b) {
      blocks.sums[b] = blocks.largest[b] >= bound ? sum_kept(b, cut, weights) : 0;
      total += blocks.sums[b];
    }
    return total;
  }

  // Weights of block b, those of tokens that are not kept are 0; returns their sum.
  float sum_kept(int64_t b, float cut, float* weights) const {
    const int64_t begin = blocks.begin(b), count = blocks.end(b) - begin;
    weigh(x + begin, count, top, inverse, weights);
    const vf cuts = set(cut), least = set(row.min_p);
    vf total = zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t n = count - i < kLanes ? count - i : kLanes;
      const vf v = take(weights + i, n);
      const vf kept =
          select((take_logits(x + begin + i, n) >= cuts) & (v >= least), v, zero());
      put(weights + i, kept, n);
      total = total + kept;
    }
    return sum(total);
  }

  // By inverse CDF in the order of ids: first a block, then a token in it.
  int64_t draw(float cut, double mass) const {
    const double target = noise_of(row, position) * mass;
    int64_t b = 0;
    double before = 0;
    while (before + blocks.sums[b] <= target) before += blocks.sums[b++];
    alignas(64) float weights[256];
    sum_kept(b, cut, weights);
    const int64_t begin = blocks.begin(b), count = blocks.end(b) - begin;
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += weights[i];
    const double share = (target - before) / blocks.sums[b];
    const double rest = (share < kBelowOne ? share : kBelowOne) * total;
    double sum = 0;
    for (int64_t i = 0;; ++i) {
      sum += weights[i];
      if (sum > rest) return begin + i;
    }
  }
};

float inverse_of(const hr_sample_row& row) {
  return row.temperature == 0 ? 0 : 1 / row.temperature;
}

void choose(const hr_sample_args& args, int64_t index, float* memory) {
  const Blocks blocks = blocks_of(args.logits.columns, index, memory);
  const hr_sample_row& row = args.table[args.rows[index]];
  const float top = largest_of(blocks);
  const float* x = row_of<float>(args.logits, index);
  const Choice choice{x, blocks, row, args.positions[index], top, inverse_of(row)};
  args.chosen[index] = top - top == 0 ? choice.token() : -1;
}

void sample(const hr_sample_args& args, const hr_step& step) {
  const int64_t vocab = args.logits.columns, count = step.tokens;
  float* memory = memory_for_blocks(vocab, count);
  bool drawn = false;
  int64_t read = 0;
  for (int64_t i = 0; i < count; ++i) {
    const hr_sample_row& row = args.table[args.rows[i]];
    drawn = drawn || row.temperature != 0;
    read += penalized(row) ? args.positions[i] : 0;
  }
  hr::parallel(count, read > kManyTokens ? 1 : count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) edit(args, i);
  });
  const int64_t pieces = (vocab + kSegment - 1) / kSegment;
  const int bits = block_bits(vocab);
  hr::parallel(count * pieces, 1 + kSegment / (vocab + 1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = pieces == 1 ? item : item / pieces, from = (item - i * pieces) * kSegment;
      const int64_t to = from + kSegment < vocab ? from + kSegment : vocab;
      float* x = row_of<float>(args.logits, i);
      const hr_sample_row& row = args.table[args.rows[i]];
      const Blocks blocks = blocks_of(vocab, i, memory);
      const int64_t first = from >> bits, last = (to + (1 << bits) - 1) >> bits;
      if (row.temperature == 0) {
        scan_together(x, blocks, first, last);
        if (pieces == 1) choose(args, i, memory);  // while the row is in the cache
      } else {
        scan(x, blocks, first, last, Choice::needs_mass(row) ? inverse_of(row) : 0);
      }
    }
  });
  if (!drawn && pieces == 1) return;
  const int64_t grain = drawn ? 1 + kDrawGrain / vocab : kSearchGrain;
  hr::parallel(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool chosen = pieces == 1 && args.table[args.rows[i]].temperature == 0;
      if (!chosen) choose(args, i, memory);
    }
  });
}

}  // namespace

HR_OPERATOR(sample, hr_sample_args)

}  // namespace HR_NS
