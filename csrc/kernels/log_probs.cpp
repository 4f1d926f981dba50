// log_probs: log-softmax of chosen tokens and of the most likely ones, by rows of logits.
#include "vocab.h"

namespace HR_NS {
namespace {

constexpr int64_t kRowGrain = 1 << 14;  // logits worth handing to another thread

// The natural logarithm of softmax(x / temperature).
struct Normal {
  float top;
  double inverse;
  double log_sum;

  float of(float x) const {
    return static_cast<float>((static_cast<double>(x) - top) * inverse - log_sum);
  }
};

// Falling logits, rising ids where they are equal.
bool before(const Candidate& a, const Candidate& b) {
  return a.x > b.x || (a.x == b.x && a.id < b.id);
}

// The `count` first of `found` in order, by insertion into the sorted list of those seen.
int64_t first_of(const Candidates& found, int64_t count, Candidate* sorted) {
  int64_t kept = 0;
  for (int64_t i = 0; i < found.count; ++i) {
    const Candidate item = found.items[i];
    if (kept == count && !before(item, sorted[kept - 1])) continue;
    int64_t place = kept < count ? kept++ : kept - 1;
    for (; place > 0 && before(item, sorted[place - 1]); --place) sorted[place] = sorted[place - 1];
    sorted[place] = item;
  }
  return kept;
}

void top_of(const float* x, const Blocks& blocks, const Normal& normal,
                   const hr_log_probs_args& args, int64_t row) {
  const Candidates found = collect(x, blocks, bound_of(blocks, args.top));
  const size_t bytes = static_cast<size_t>(args.top) * sizeof(Candidate);
  Candidate* sorted = static_cast<Candidate*>(hr::scratch(bytes, 3));
  const int64_t kept = first_of(found, args.top, sorted);
  for (int64_t i = 0; i < kept; ++i) {
    args.top_ids[row * args.top + i] = sorted[i].id;
    args.top_values[row * args.top + i] = normal.of(sorted[i].x);
  }
}

void score_row(const hr_log_probs_args& args, int64_t row, float* memory) {
  const float* x = row_of<float>(args.logits, args.rows[row]);
  const Blocks blocks = blocks_of(args.logits.columns, row, memory);
  const float inverse = args.temperature[row] == 0 ? 1 : 1 / args.temperature[row];
  float* values = args.values + row * args.width;
  const float top = largest_of(blocks);
  if (top - top != 0) {  // no distribution
    for (int64_t i = 0; i < args.width; ++i) values[i] = __builtin_nanf("");
    for (int64_t i = row * args.top; i < (row + 1) * args.top; ++i) {
      args.top_ids[i] = 0;
      args.top_values[i] = __builtin_nanf("");
    }
    return;
  }
  const Normal normal{top, inverse, log(rescale(blocks, top, inverse))};
  for (int64_t i = 0; i < args.width; ++i) values[i] = normal.of(x[args.ids[row * args.width + i]]);
  if (args.top > 0) top_of(x, blocks, normal, args, row);
}

void log_probs(const hr_log_probs_args& args, const hr_step& step) {
  const int64_t vocab = args.logits.columns, rows = step.tokens;
  float* memory = memory_for_blocks(vocab, rows);
  const int64_t pieces = (vocab + kSegment - 1) / kSegment, size = block_size(vocab);
  hr::parallel(rows * pieces, 1 + kSegment / (vocab + 1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / pieces, from = item % pieces * kSegment;
      const int64_t to = from + kSegment < vocab ? from + kSegment : vocab;
      const float temperature = args.temperature[row];
      scan(row_of<float>(args.logits, args.rows[row]), blocks_of(vocab, row, memory), from / size,
           (to + size - 1) / size, temperature == 0 ? 1 : 1 / temperature);
    }
  });
  hr::parallel(rows, 1 + kRowGrain / (vocab + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) score_row(args, row, memory);
  });
}

}  // namespace

HR_OPERATOR(log_probs, hr_log_probs_args)

}  // namespace HR_NS
