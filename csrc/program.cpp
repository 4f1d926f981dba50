// Recorded operator calls, replayed in order. Arguments are copied in, so that their owner may go.
#include <string.h>

#include <memory>
#include <vector>

#include "api.h"

struct hr_program {
  struct Call {
    int32_t operator_index;
    std::unique_ptr<unsigned char[]> args;
  };
  std::vector<Call> calls;
};

hr_program* hr_program_new(void) { return new hr_program; }

void hr_program_free(hr_program* program) { delete program; }

int64_t hr_program_append(hr_program* program, int32_t operator_index, const void* args,
                          int64_t size) {
  std::unique_ptr<unsigned char[]> copy(new unsigned char[static_cast<size_t>(size)]);
  memcpy(copy.get(), args, static_cast<size_t>(size));
  program->calls.push_back({operator_index, std::move(copy)});
  return static_cast<int64_t>(program->calls.size()) - 1;
}

int64_t hr_program_length(const hr_program* program) {
  return static_cast<int64_t>(program->calls.size());
}

int32_t hr_program_operator(const hr_program* program, int64_t call) {
  return program->calls[static_cast<size_t>(call)].operator_index;
}

void hr_replay(const hr_program* program, const hr_step* step) {
  for (const auto& call : program->calls) {
    hr::kernel_of(call.operator_index)(call.args.get(), *step);
  }
}

void hr_replay_timed(const hr_program* program, const hr_step* step, int64_t* nanoseconds) {
  int64_t begin = hr::now();
  for (const auto& call : program->calls) {
    hr::kernel_of(call.operator_index)(call.args.get(), *step);
    const int64_t end = hr::now();
    *nanoseconds++ += end - begin;
    begin = end;
  }
}
