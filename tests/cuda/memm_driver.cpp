// Runs the memm launchers on cases from a file and writes what they return: the emulated twin of
// csrc/cuda/memm_ops.cpp. Every array is an allocation of its exact size, so that AddressSanitizer sees any step beside
// it; outputs and workspaces start as 0xff (NaN).
#include "cuda/memm.h"

using namespace fastnlp;
using namespace fastnlp::cuda;

namespace {

struct Memory {
  char* data;
  explicit Memory(int64_t bytes) : data(static_cast<char*>(std::malloc(size_t(bytes > 0 ? bytes : 1)))) {
    std::memset(data, 0xff, size_t(bytes));
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

FILE* input;
FILE* output;

void read(const Memory& to, int64_t bytes) {
  if (bytes > 0 && std::fread(to.data, 1, size_t(bytes), input) != size_t(bytes)) std::abort();
}
void write(const Memory& from, int64_t bytes) { std::fwrite(from.data, 1, size_t(bytes), output); }
void must(cudaError_t error) {
  if (error != cudaSuccess) std::abort();
}

void run_case(const int64_t* header) {
  const int64_t B = header[1], T = header[2], N = header[3];
  MemmProblem p{};
  p.batch = B, p.steps = T, p.tags = N;
  p.emissions_dtype = DType(header[0]);
  const int64_t C = p.emissions_dtype == DType::f64 ? 8 : 4;
  const int64_t E = p.emissions_dtype == DType::f32 ? 4 : p.emissions_dtype == DType::f64 ? 8 : 2;
  Memory emissions(B * T * N * E), transitions(N * N * C), tags(B * T * 8), mask(B * T), grad(B * C);
  read(emissions, B * T * N * E);
  read(transitions, N * N * C);
  read(tags, B * T * 8);
  if (header[4]) read(mask, B * T), p.mask = reinterpret_cast<Bool*>(mask.data);
  read(grad, B * C);
  p.emissions = emissions.data;
  p.emissions_batch_stride = T * N;
  p.emissions_step_stride = N;
  p.transitions = transitions.data;
  p.transitions_from_stride = header[7] ? 1 : N;
  p.transitions_to_stride = header[7] ? N : 1;
  p.gold = reinterpret_cast<int64_t*>(tags.data);
  p.bidirectional = header[5];

  Memory value(B * C), rows(memm_forward_bytes(p));
  must(memm_forward(p, value.data, rows.data, nullptr));
  write(value, B * C);
  Memory demissions(B * T * N * E), dtransitions(N * N * C);
  MemmBackward backward;
  backward.grad = grad.data;
  backward.demissions = demissions.data;
  backward.dtransitions = header[6] ? dtransitions.data : nullptr;
  Memory workspace(memm_backward_bytes(p, backward));
  must(memm_backward(p, backward, workspace.data, nullptr));
  write(demissions, B * T * N * E);
  write(dtransitions, N * N * C);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  input = std::fopen(argv[1], "rb");
  output = std::fopen(argv[2], "wb");
  int64_t header[8];
  while (std::fread(header, sizeof header, 1, input) == 1) run_case(header);
  std::fclose(output);
  return 0;
}
