// paged_attention: (mostly causal) attention of any mix of prefill chunks and decode rows in one
// call. Here a step is cut into tiles and spans (attention_walk.h), and these among threads.
//
// Spans of kSpan positions, aligned at multiples of kSpan from position 0, are joined in the order
// of position, by the tile itself or, if there are fewer tiles than threads, from partial results.
//
// Invariant: a row's value depends neither on the tile it is in, nor on who computed which span, nor
// on how the sequence was cut into chunks; see attention_walk.h.
#include "attention_walk.h"

namespace HR_NS {

namespace {

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
  const int64_t low = oldest_seen(args, oldest);
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
template <class T>
static void run_items(const hr_attention_args& args, const hr_step& step, const Cut& cut) {
  int64_t pairs = 0;
  for (int64_t chunk = 0; chunk < step.chunks; ++chunk) {
    pairs += static_cast<int64_t>(step.context[chunk]) *
             (step.query_start[chunk + 1] - step.query_start[chunk]);
  }
  const int64_t each = 1 + pairs * 2 * args.q.columns / (cut.items + 1);
  hr::parallel(cut.items, 1 + (1 << 17) / each, [&](int64_t begin, int64_t end) {
    Walk<T> walk(args, step);
    for (int64_t i = begin; i < end; ++i) walk.run(cut.tile(i));
  });
}

// Every span of every item by itself, then what they make together.
template <class T>
static void run_spans(const hr_attention_args& args, const hr_step& step, const Cut& cut,
                      int64_t spans) {
  const Shape shape(args, vectors_of<T>);
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
    Walk<T> walk(args, step);
    for (int64_t i = begin; i < end; ++i) {
      Tile tile = cut.tile(shares[i].item);
      tile.first_span = tile.last_span = tile.first_span + shares[i].span;
      tile.partial = shares[i].partial;
      walk.run(tile);
    }
  });
  Walk<T> walk(args, step);
  for (int64_t i = 0; i < count; ++i) {
    const Tile tile = cut.tile(shares[i].item);
    if (shares[i].span == 0) {
      walk.collect(tile, shares[i].partial, tile.last_span - tile.first_span + 1);
    }
  }
}

}  // namespace

template <class T>
static void attend(const hr_attention_args& args, const hr_step& step) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t queries = group < kTileRows ? kTileRows / group : 1;
  const size_t room = static_cast<size_t>(step.tokens + step.chunks) * sizeof(Piece);
  Piece* pieces = static_cast<Piece*>(hr::scratch(room, 3));
  const int64_t made = order_pieces(args, step, queries, pieces);
  int64_t spans = 0;
  for (int64_t i = 0; i < made; ++i) spans += pieces[i].spans;
  // Heads of a position are neighbors in memory, and all of them are read at a higher rate than one:
  // decode rows are cut between spans, and between heads only where threads would have none. Many
  // queries of few sequences are cut between heads first.
  const bool decode = step.tokens <= 2 * made;
  const int64_t threads = hr::threads();
  int64_t parts = decode ? 1 : args.kv_heads;
  const bool cut_spans = threads > 1 && spans > made && made * parts < 4 * threads;
  const int64_t each = cut_spans ? spans : made;
  while (parts < args.kv_heads && (each * parts < threads || args.kv_heads % parts)) ++parts;
  const Cut cut = {pieces, made * parts, parts, args.kv_heads / parts};
  if (cut_spans) {
    run_spans<T>(args, step, cut, spans);
  } else {
    run_items<T>(args, step, cut);
  }
}

static void paged_attention(const hr_attention_args& args, const hr_step& step) {
  with_cache_type(args.cache_dtype, [&](auto type) { attend<decltype(type)>(args, step); });
}

HR_OPERATOR(paged_attention, hr_attention_args)

}  // namespace HR_NS
