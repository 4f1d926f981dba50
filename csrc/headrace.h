// The contract between Python and the kernels: plain C structs, no torch, no C++ types.
//
// An operator is an opcode, a fixed argument struct (pointers to weights, caches and activation
// buffers, sizes that never change) and a step (what differs from one forward pass to the next).
// Called one at a time for tests, or as a recorded program, replayed in one call per step.
// The same operators are compiled once for each instruction set; `hr_open` picks the level.
//
// Invariant (determinism): the value of an output row depends on that row's inputs alone, never on
// the number of tokens, chunks or threads. Sums have one fixed order per output element.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef enum {
  HR_F32 = 0,
  HR_BF16 = 1,
  HR_F16 = 2,
  HR_I8 = 3,
  HR_F8 = 4,
  HR_I4 = 5,
  HR_G8 = 6,  // int8 in groups
  HR_MX4 = 7,  // e2m1 in groups, mxfp4
  HR_T4 = 8    // places in a table of 16 numbers, in groups
} hr_dtype;

typedef enum {
  HR_PORTABLE = 0,
  HR_AVX2 = 1,
  HR_AVX512 = 2,
  HR_AVX512_BF16 = 3,
  HR_AMX = 4
} hr_level;

// What differs between steps. All arrays live until the call returns.
typedef struct {
  int64_t tokens;             // rows of every activation buffer that are in use
  int64_t chunks;             // sequences in this step
  const int64_t* ids;         // [tokens]
  const int64_t* positions;   // [tokens]
  const int64_t* slots;       // [tokens] page * page_size + offset of each token's KV
  const int32_t* page_table;  // [rows, page_stride]
  int64_t page_stride;
  const int32_t* rows;         // [chunks] row of each chunk
  const int32_t* query_start;  // [chunks + 1] offsets of chunks in the token dimension
  const int32_t* context;      // [chunks] tokens visible after the chunk
  int64_t picked;              // rows whose logits are wanted
  const int64_t* picks;        // [picked] token index of each
} hr_step;

// A 2-D view of activations: `rows` come from the step, `columns` do not change.
typedef struct {
  void* data;
  int64_t stride;  // elements from one row to the next
  int64_t columns;
  int32_t dtype;  // hr_dtype
} hr_rows;

// ---- library ------------------------------------------------------------------------------------

#define HR_ABI 10  // changes whenever a struct or a function here does

// What level HR_AMX needs, in the order in which it is looked for.
typedef enum {
  HR_GRANTED = 0,
  HR_NO_CPU = 1,    // no tiles, no bf16 or no int8 products of them
  HR_NO_STATE = 2,  // the system does not save tile registers
  HR_REFUSED = 3    // the system saves them, but not for this process
} hr_permission;

int32_t hr_abi(void);
int32_t hr_level_best(void);              // highest level this machine can run
int32_t hr_level_in_use(void);            // the best one until another is set
int32_t hr_amx_permission(void);          // hr_permission
int32_t hr_set_level(int32_t level);      // -1: this machine cannot run it
int32_t hr_threads(void);                 // threads per operator, the caller included; 1 at first
void hr_set_threads(int32_t count);

// Index of an operator; -1 unknown, -2 its argument struct has another size.
int32_t hr_operator(const char* name, int64_t args_size);
int32_t hr_operator_count(void);
const char* hr_operator_name(int32_t index);

// Runs one operator now.
void hr_call(int32_t operator_index, const void* args, const hr_step* step);

// A program is a list of calls whose arguments are fixed; only the step changes.
typedef struct hr_program hr_program;
hr_program* hr_program_new(void);
void hr_program_free(hr_program* program);
int64_t hr_program_append(hr_program* program, int32_t operator_index, const void* args,
                          int64_t size);  // copies args; returns the call's number
int64_t hr_program_length(const hr_program* program);
int32_t hr_program_operator(const hr_program* program, int64_t call);
void hr_replay(const hr_program* program, const hr_step* step);
// The same, and adds to nanoseconds[i] what call i took.
void hr_replay_timed(const hr_program* program, const hr_step* step, int64_t* nanoseconds);

// Which count of the step says how many rows of its buffers an operator works on.
typedef enum { HR_TOKENS = 0, HR_PICKED = 1 } hr_over;

// ---- arguments of operators, by family ----------------------------------------------------------

// copy: target[i] = source[i] for the step's tokens; same dtype and columns. (kernels/copy.cpp)
typedef struct {
  hr_rows source;
  hr_rows target;
} hr_copy_args;

// probe_*: what this machine can do at most (kernels/probe.cpp). Each runs `pieces` pieces of work
// on the team: reading `bytes` bytes of `data`, or `rounds` rounds of HR_PROBE_CHAINS independent
// vector instructions, or of 128 that do nothing. `sink` [pieces] keeps the compiler honest.
typedef struct {
  const void* data;
  float* sink;
  int64_t pieces;
  int64_t bytes;
  int64_t rounds;
} hr_probe_args;

#define HR_PROBE_CHAINS 24

// The weight of a linear layer, W [out, in], cut into panels of HR_PANEL outputs. A panel holds its
// k-th inputs side by side, so a product reads memory front to back. Rows past `out` and inputs
// past `in` are zero. Layouts of one panel (kernels/linear_pack.cpp):
//   f32, f16  [in, up to even][HR_PANEL]           bf16  [in / 2, up][HR_PANEL][2 inputs]
// Low-bit weights (kernels/linear_int8.cpp, linear_int4.cpp, linear_fp8.cpp):
//   i8  [in / 4, up][HR_PANEL][4 inputs] of value + 128; `scales` [out, up to HR_PANEL]
//   i4  [in / group, up] of (scale f16 [HR_PANEL], and what hr_scaling adds;
//       [group / 8][HR_PANEL][4] bytes, byte i: input i in the low half, input 4 + i in the high)
//   mx4 the same, of codes; scale / 2 as bf16 [HR_PANEL]
//   g8  the same, but [group / 4][HR_PANEL][4 inputs] of value + 128
//   f8  [in][HR_PANEL] of e4m3; `scales` [in / group, up, or 1][out, up to HR_PANEL]
//   t4  [in][HR_PANEL / 2] bytes, byte j: output j in the low half, 16 + j in the high; `scales` as
//       f8; before all panels the table, f32 [16]
typedef struct {
  void* data;
  const float* scales;  // fp32, of i8, f8 and t4 alone
  int64_t out;
  int64_t in;
  int32_t dtype;    // hr_dtype
  int32_t group;    // inputs per scale, i4, g8, mx4, t4: 16, 32, 64, 128, f8: 128; 0: one per output
  int32_t scaling;  // hr_scaling, of i4 and g8
} hr_weight;

// What a value q of 0..15, or -128..127, stands for, and what lies beside the scales of its group.
typedef enum {
  HR_SYMMETRIC = 0,  // scale * (q - 8), scale * q of 8 bits
  HR_ZEROS = 1,      // scale * (q - zero), zero f16 [HR_PANEL]
  HR_OFFSETS = 2,    // scale * q - offset, scale and offset both f32 [HR_PANEL]
  HR_WIDE = 3        // of 8 bits: scale * q, scale f32 [HR_PANEL]
} hr_scaling;

#define HR_PANEL 32

// Bytes of `data`; out, in, dtype and group are given.
int64_t hr_weight_bytes(const hr_weight* weight);

// pack: fill `weight.data` from `source` [out, in], of the same dtype.
typedef struct {
  hr_rows source;
  hr_weight weight;
} hr_pack_args;

// pack_int8, pack_int4, pack_fp8: fill `weight.data` from `source` [out, in]. Where that is a float
// matrix (not for fp8) it is quantized as headrace.ops.ref defines. Else it holds bytes: signed
// values, values of 0..15, codes of e2m1, or e4m3. pack_int4 also fills g8 and mx4, pack_fp8 t4.
typedef struct {
  hr_rows source;
  hr_weight weight;
  float* scales;         // i8: [out], written when quantizing; else: [out, in / group, up], read
  const float* offsets;  // i4, g8: as `scales`; null where symmetric; t4: the table
} hr_pack_lowbit_args;

// linear: y = x W^T + bias + residual; x and y fp32, bf16 or f16, sums in fp32, rounded once.
// (kernels/linear.cpp)
// linear_int8, linear_int4: x is quantized to 8 bits per row, or per row and group of inputs, and
// multiplied in integers; linear_fp8: weights are widened to fp32. linear_int4 also reads g8 and mx4,
// linear_fp8 t4. (kernels/linear_*.cpp)
typedef struct {
  hr_rows x;
  hr_rows y;
  hr_weight weight;
  const void* bias;  // [out] or null
  int32_t bias_dtype;
  int32_t over;      // hr_over
  hr_rows residual;  // of y's dtype; no data: none
} hr_linear_args;

// gated_linear: y = act(x G^T + bias) * (x U^T + bias). Both products are rounded to y's dtype
// before the activation, so y has the bits of linear and gated one after the other.
typedef struct {
  hr_rows x;
  hr_rows y;
  hr_weight gate;
  hr_weight up;      // of the same shape and dtype
  const void* bias;  // [gate's, then up's] or null
  int32_t bias_dtype;
  int32_t activation;
  float alpha;  // of HR_SWIGLU_CLAMPED
  float limit;
} hr_gated_linear_args;

// unpack, unpack_int8, unpack_int4, unpack_fp8: rows step.ids - first of a packed weight, y [tokens,
// in] of any float dtype (an embedding); zeros for rows that it does not have.
typedef struct {
  hr_weight weight;
  hr_rows y;
  int64_t first;
} hr_unpack_args;

// embedding: y[i] = weight[step.ids[i]], weight [vocab, y.columns]; of learned positions
// weight[step.positions[i] + first]. (kernels/elementwise.cpp)
typedef struct {
  const void* weight;
  hr_rows y;
  int32_t dtype;  // of weight
  int32_t by_position;
  int64_t first;
} hr_embedding_args;

// combine: y = clip(cap * tanh((a * x + b * z) / cap)); z may have no data; without cap no tanh, and
// without limit no clip to [-limit, limit]. Same dtypes. With a gate [tokens, 1] z counts as much as
// its sigmoid.
typedef struct {
  hr_rows x;
  hr_rows z;
  hr_rows gate;
  hr_rows y;
  float a;
  float b;
  float cap;
  float limit;
} hr_combine_args;

// columns: y[i][j] = x[i][order[j]] for the step's tokens; same dtype.
typedef struct {
  hr_rows x;
  hr_rows y;
  const int64_t* order;  // [y.columns]
} hr_columns_args;

// gather: y[i] = x[step.picks[i]] for the step's tokens; same dtype and columns.
typedef struct {
  hr_rows x;
  hr_rows y;
} hr_gather_args;

// mask_logits: for i of the step's tokens, -inf to each logit of row rows[i] whose bit in
// masks[i] is 0; logit t has bit t % 32 of word t / 32. Logits are fp32. (kernels/mask.cpp)
typedef struct {
  hr_rows logits;
  const int64_t* rows;   // all different
  const int32_t* masks;  // [tokens, words]
  int64_t words;         // at least columns / 32, rounded up
} hr_mask_logits_args;

// gated: y = act(gate) * up, where x = gate | up; y = act(x) if x is as wide as y. The clamped one is
// g * sigmoid(alpha * g) * (u + 1), where g = min(gate, limit), u = up clipped to [-limit, limit].
typedef enum {
  HR_SILU = 0,
  HR_GELU_TANH = 1,
  HR_GELU_ERF = 2,
  HR_RELU = 3,
  HR_RELU_SQUARED = 4,
  HR_SWIGLU_CLAMPED = 5  // gated alone
} hr_activation;
typedef struct {
  hr_rows x;
  hr_rows y;
  int32_t activation;
  float alpha;
  float limit;
} hr_gated_args;

// rms_norm: of each of `parts` equal parts of a row. `residual` may have no data: then nothing is
// added and `total` is not written. Dtypes are equal, but for the weight's. (kernels/norm.cpp)
typedef struct {
  hr_rows x;
  hr_rows residual;
  hr_rows total;  // x + residual
  hr_rows y;
  const void* weight;  // [columns / parts]
  int32_t weight_dtype;
  float eps;
  int64_t parts;
} hr_rms_norm_args;

// layer_norm: of each of `parts` equal parts of a row; bias may be null. The weight is one for all
// parts, or one for each.
typedef struct {
  hr_rows x;
  hr_rows y;
  int64_t parts;
  int64_t weights;  // 1 or parts
  const void* weight;
  const void* bias;
  int32_t weight_dtype;
  float eps;
} hr_layer_norm_args;

// rotary_kv: turns the heads of q and k in place by the angles of row i of cos_sin (cosines | sines,
// fp32), from element `first` of each head on, then writes k and v to slot step.slots[i] of the
// caches. Without cos_sin nothing turns, without keys or values these are not written.
// (kernels/rope.cpp)
// A cache may be narrower than k and v. HR_F8 (e4m3): x / scale, rounded to nearest even, at most
// 448 in size, one scale per cache. HR_I8: per token and KV head x * (127 / m), rounded the same,
// where m is the largest |x| of the head, and m / 127 in `key_scales` or `value_scales`, which lie
// beside the pages as [slots, kv_heads].
typedef struct {
  hr_rows q;
  hr_rows k;
  hr_rows v;
  hr_rows cos_sin;
  void* keys;    // [slots, k.columns]
  void* values;  // [slots, v.columns]
  float* key_scales;    // null but for HR_I8
  float* value_scales;  // the same
  int64_t heads;
  int64_t kv_heads;
  int64_t first;
  float key_scale;  // read for HR_F8 alone
  float value_scale;
  int32_t cache_dtype;
  int32_t interleaved;
} hr_rotary_kv_args;

// router: the `top_k` largest of each row of logits, the largest first and the lower expert among
// equals; ids int32 [tokens, top_k], weights fp32 [tokens, top_k]: softmax over all experts (or the
// sigmoid of each), divided by the sum of those chosen if `renormalize`, times `scale`. A bias is
// added to the scores for the choice alone. Of more than one group of equal size only the
// `top_groups` are chosen from whose `group_best` best scores have the largest sum. With a `jitter`
// above 0 it is SparseMixer instead: each expert chosen is weighed against those not chosen before
// it whose distance to it is at most 2 * jitter of the larger in size. (kernels/moe.cpp)
#define HR_MOST_GROUPS 64
typedef struct {
  hr_rows logits;
  hr_rows weights;
  int32_t* ids;
  const float* bias;  // [experts] or null
  int64_t top_k;
  int64_t groups;
  int64_t top_groups;
  int64_t group_best;  // at most HR_MOST_GROUPS
  int32_t renormalize;
  int32_t sigmoid;
  float scale;
  float jitter;
} hr_router_args;

// moe: y[i] = sum over r of weights[i][r] * expert ids[i][r] of x[i], in the order of r, in fp32. An
// expert is gated_linear, then linear with `down`, each rounded to x's dtype; weights are of any dtype
// that a linear_* operator reads. With `on_input` x is multiplied with the weight instead, and
// rounded, before the expert sees it. `experts` are here, from number `first` on; others add nothing.
// `orders`: which of its inputs, in which order, a matrix that is not of floats takes (act-order).
typedef struct {
  hr_rows x;
  hr_rows y;
  hr_rows weights;         // fp32 [tokens, top_k]
  const int32_t* ids;      // [tokens, top_k]
  const hr_weight* gates;  // [experts], as ups and downs
  const hr_weight* ups;
  const hr_weight* downs;
  const float* gate_up_bias;  // [experts, gate | up] or null
  const float* down_bias;     // [experts, hidden] or null
  const int64_t* const* orders;  // [gates | ups | downs], each [in] or null; null: all in order
  int64_t experts;
  int64_t inner;
  int64_t top_k;
  int32_t activation;
  float alpha;
  float limit;
  int32_t on_input;
  int64_t first;
} hr_moe_args;

// heads_linear: of each head's elements of x the first `in` go through the head's own weight, and
// the others follow what came out as they are: x [tokens, heads * (in + rest)], y [tokens,
// heads * (out + rest)], of one dtype. (kernels/linear_heads.cpp)
typedef struct {
  hr_rows x;
  hr_rows y;
  const hr_weight* weights;  // [heads], of one shape
  int64_t heads;
} hr_heads_linear_args;

// paged_attention: see headrace.ops. (kernels/attention.cpp)
#define HR_MOST_HEAD_DIM 1024
typedef struct {
  hr_rows q;           // [tokens, heads * head_dim]
  hr_rows out;         // the same; narrower if a value is the beginning of its key
  const void* keys;    // [pages, page_size, kv_heads, head_dim]
  const void* values;  // the same; `keys` where `out` is narrower
  const float* key_scales;  // HR_I8: [pages, page_size, kv_heads], see rotary_kv
  const float* value_scales;
  const float* sinks;  // [heads] or null
  const float* slopes;  // [heads] or null: a score gets slope * (position of key - of query)
  int64_t heads;
  int64_t kv_heads;
  int64_t page_size;
  int64_t window;  // 0: everything
  float scale;
  float soft_cap;  // 0: none
  float key_scale;  // HR_F8: what a stored 1 means
  float value_scale;
  int32_t cache_dtype;
  int32_t both_ways;  // a query also sees the positions after its own, to the end of its chunk
  int32_t in_chunks;  // `window` cuts the sequence into chunks, and a query sees its own chunk
} hr_attention_args;

// sample: the next token of each of step.tokens rows (kernels/sample.cpp). The fields are those of
// headrace.core.messages.SamplingParams; `temperature` 0 is greedy, `top_k` 0 keeps all.
typedef struct {
  const int32_t* tokens;  // prompt and output
  int64_t prompt_len;
  const int32_t* bias_ids;  // [bias_count]
  const float* bias;        // [bias_count]
  const int32_t* stops;     // [stop_count] forbidden, with eos, before min_new_tokens
  int64_t min_new_tokens;
  uint64_t seed;
  int64_t sample_index;
  double top_p;
  int32_t bias_count;
  int32_t stop_count;
  int32_t top_k;
  float temperature;
  float min_p;
  float frequency_penalty;
  float presence_penalty;
  float repetition_penalty;
} hr_sample_row;

typedef struct {
  hr_rows logits;  // fp32 [tokens, vocab]; edits are written here
  const hr_sample_row* table;
  const int64_t* rows;       // [tokens] record of each row in the table
  const int64_t* positions;  // [tokens] of the token to choose: tokens before it count
  const int32_t* eos;  // [eos_count]
  int64_t eos_count;
  int64_t* chosen;  // [tokens]; -1: NaN, +inf, or nothing but -inf
} hr_sample_args;

// log_probs: of the softmax of rows of logits (kernels/log_probs.cpp). Row i of the step is row
// rows[i] of the logits. A row without a distribution gets NaN.
typedef struct {
  hr_rows logits;  // fp32 [, vocab]
  const int64_t* rows;
  const float* temperature;  // 0 counts as 1
  const int64_t* ids;        // [tokens, width]
  int64_t width;
  int64_t top;        // at most the vocabulary
  float* values;      // [tokens, width]
  int64_t* top_ids;   // [tokens, top] in falling order, of equal ones the lower id first
  float* top_values;  // the same
} hr_log_probs_args;

// ---- ranks that share memory (kernels/collective.cpp) -------------------------------------------

// A board is zero at first: `size` lines of HR_BOARD_LINE bytes, then 2 * size slots of `slot` bytes.
// A slot has room for a row of whatever is exchanged.
#define HR_BOARD_LINE 128
typedef struct {
  void* board;  // where it is in this process
  int64_t slot;
  int32_t rank;
  int32_t size;  // 1: the board may be null
} hr_team;

// all_reduce: y = the sum of all ranks' x; float dtypes, sums in fp32, rounded once.
typedef struct {
  hr_rows x;
  hr_rows y;
  hr_team team;
} hr_all_reduce_args;

// Columns [part, part + count) of a rank's rows are columns from `whole` on of all.
typedef struct {
  int64_t whole;
  int64_t part;
  int64_t count;
} hr_span;

// all_gather: the columns of all ranks; together their spans are all columns of y, each once.
typedef struct {
  hr_rows x;
  hr_rows y;
  hr_team team;
  const hr_span* spans;
  int64_t count;
} hr_all_gather_args;

// take_part: a rank's columns y of whole rows x; zeros where no span is.
typedef struct {
  hr_rows x;
  hr_rows y;
  const hr_span* spans;
  int64_t count;
} hr_take_part_args;

// send, receive: rows x to or from the other end of a pipe, which is zero at first: two lines of
// HR_BOARD_LINE bytes, then HR_PIPE_BLOCKS blocks of `block` bytes, room for a row each.
#define HR_PIPE_BLOCKS 4
typedef struct {
  hr_rows x;
  void* pipe;
  int64_t block;
} hr_pass_args;

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
