// What llama.cpp makes of a GGUF file. Built against its libraries; see make.py.
//
//   oracle FILE logits IDS OUT      int32 ids -> fp32 [ids, vocabulary], with an fp32 cache
//   oracle FILE tokens TEXTS OUT    texts -> for each an int32 count and as many int32 ids
//   oracle FILE quantize OUT TYPE   the same model with its matrices as a llama_ftype
//
// A text is UTF-8 that ends with NUL; the byte before it says whether the model's tokens stand
// around it ('1') or not ('0'). Special tokens are read as such.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "llama.h"

static std::vector<char> read(const char *path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

template <typename T>
static int write(const char *path, const std::vector<T> &values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char *>(values.data()), values.size() * sizeof(T));
  return file.good() ? 0 : 1;
}

static int quantize(const char *from, const char *to, int type) {
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.nthread = 1;
  params.ftype = static_cast<llama_ftype>(type);
  params.allow_requantize = true;
  return llama_model_quantize(from, to, &params);
}

static int logits(llama_model *model, const char *in, const char *out) {
  std::vector<char> raw = read(in);
  std::vector<llama_token> ids(raw.size() / sizeof(llama_token));
  memcpy(ids.data(), raw.data(), raw.size());
  const int count = ids.size(), vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 256;
  params.n_threads = params.n_threads_batch = 1;
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  llama_context *context = llama_init_from_model(model, params);
  if (!context) return 2;
  llama_batch batch = llama_batch_init(count, 0, 1);
  for (int i = 0; i < count; ++i) {
    batch.token[i] = ids[i];
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = true;
  }
  batch.n_tokens = count;
  if (llama_decode(context, batch)) return 3;
  std::vector<float> found;
  for (int i = 0; i < count; ++i) {
    const float *row = llama_get_logits_ith(context, i);
    found.insert(found.end(), row, row + vocab);
  }
  return write(out, found);
}

static int tokens(llama_model *model, const char *in, const char *out) {
  std::vector<char> raw = read(in);
  std::vector<llama_token> found;
  for (size_t at = 0; at < raw.size();) {
    const bool framed = raw[at] == '1';
    const std::string text(&raw[at + 1]);
    at += text.size() + 2;
    std::vector<llama_token> ids(text.size() + 16);
    const int count = llama_tokenize(llama_model_get_vocab(model), text.data(), text.size(),
                                     ids.data(), ids.size(), framed, true);
    if (count < 0) return 4;
    found.push_back(count);
    found.insert(found.end(), ids.begin(), ids.begin() + count);
  }
  return write(out, found);
}

int main(int argc, char **argv) {
  if (argc != 5) return 1;
  llama_backend_init();
  llama_log_set(
      [](ggml_log_level level, const char *text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
      },
      nullptr);
  if (!strcmp(argv[2], "quantize")) return quantize(argv[1], argv[3], atoi(argv[4]));
  llama_model_params params = llama_model_default_params();
  params.vocab_only = !strcmp(argv[2], "tokens");
  llama_model *model = llama_model_load_from_file(argv[1], params);
  if (!model) return 5;
  return params.vocab_only ? tokens(model, argv[3], argv[4]) : logits(model, argv[3], argv[4]);
}
