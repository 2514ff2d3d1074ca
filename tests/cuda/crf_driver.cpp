// Runs crf launchers on cases from a file and writes what they return: the emulated twin of csrc/cuda/crf_ops.cpp.
// Every array is an allocation of its exact size, so that AddressSanitizer sees any step beside it; outputs and
// workspaces start as 0xff (NaN).
#include <vector>

#include "cuda/crf.h"

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

void read(void* to, int64_t bytes) {
  if (bytes > 0 && std::fread(to, 1, size_t(bytes), input) != size_t(bytes)) std::abort();
}
void write(const Memory& from, int64_t bytes) { std::fwrite(from.data, 1, size_t(bytes), output); }
void must(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "launch error %d\n", error);
    std::abort();
  }
}

enum Op { kTrain, kViterbi, kBest, kSample, kEntropy };

// Twice with the same inputs: the results must not differ in a bit, which the caller checks by comparing two cases.
void run_case(const int64_t* header) {
  const int64_t op = header[0], B = header[2], T = header[3], N = header[4];
  const bool packed = header[8], chunked = header[10], has_tags = header[11], transition_grad = header[12];
  const int64_t n = header[13];
  const bool transposed = header[14];
  CrfProblem p{};
  p.batch = B, p.steps = T, p.tags = N;
  p.emissions_dtype = DType(header[1]);
  const int64_t C = p.emissions_dtype == DType::f64 ? 8 : 4;
  const int64_t E = p.emissions_dtype == DType::f32 ? 4 : p.emissions_dtype == DType::f64 ? 8 : 2;
  const int64_t R = packed ? T : B * T;
  p.transitions_per_position = header[9];
  const int64_t matrices = p.transitions_per_position ? B * (T > 0 ? T - 1 : 0) : 1;

  Memory emissions(R * N * E), transitions(matrices * N * N * C), start(N * C), end(N * C), mask(B * T),
      cu((B + 1) * 8);
  Memory tags(R * 8), grad(B * C), uniforms(n * R * 4);
  read(emissions.data, R * N * E);
  read(transitions.data, matrices * N * N * C);
  p.emissions = emissions.data;
  p.emissions_step_stride = N;
  p.emissions_batch_stride = packed ? 0 : T * N;
  p.transitions = transitions.data;
  p.transitions_batch_stride = p.transitions_per_position ? (T - 1) * N * N : 0;
  p.transitions_step_stride = p.transitions_per_position ? N * N : 0;
  p.transitions_from_stride = transposed ? 1 : N;
  p.transitions_to_stride = transposed ? N : 1;
  if (header[5]) read(start.data, N * C), p.start = start.data;
  if (header[6]) read(end.data, N * C), p.end = end.data;
  if (header[7]) read(mask.data, B * T), p.mask = reinterpret_cast<Bool*>(mask.data);
  if (packed) read(cu.data, (B + 1) * 8), p.cu_seqlens = reinterpret_cast<int64_t*>(cu.data);
  if (has_tags) read(tags.data, R * 8);
  if (op == kTrain) read(grad.data, B * C);
  if (op == kSample) read(uniforms.data, n * R * 4);

  Memory found(crf_sequences_bytes(p));
  CrfSequences sequences;
  must(crf_find_sequences(p, found.data, &sequences, nullptr));

  const int64_t message_bytes = crf_message_rows(R) * N * C;
  Memory messages(message_bytes), value(B * C);
  CrfForward forward;
  forward.tags = has_tags ? reinterpret_cast<int64_t*>(tags.data) : nullptr;
  forward.chunked = chunked;
  const auto run_forward = [&](bool save) {
    forward.messages = save ? messages.data : nullptr;
    Memory workspace(crf_forward_bytes(p, forward));
    must(crf_forward(p, sequences, forward, workspace.data, nullptr));
  };
  if (op == kTrain) {
    forward.output = value.data;
    run_forward(false);
    write(value, B * C);
    run_forward(true);
    write(value, B * C);
    Memory demissions(R * N * E), dtransitions(matrices * N * N * C), dstart(N * C), dend(N * C);
    CrfBackward backward;
    backward.grad = grad.data;
    backward.messages = messages.data;
    backward.tags = forward.tags;
    backward.demissions = demissions.data;
    backward.dtransitions = transition_grad ? dtransitions.data : nullptr;
    backward.dstart = dstart.data;
    backward.dend = dend.data;
    backward.chunked = chunked;
    Memory workspace(crf_backward_bytes(p, backward));
    must(crf_backward(p, sequences, backward, workspace.data, nullptr));
    write(demissions, R * N * E);
    write(dtransitions, matrices * N * N * C);
    write(dstart, N * C);
    write(dend, N * C);
  } else if (op == kViterbi) {
    Memory paths(R * 8), workspace(crf_viterbi_bytes(p));
    must(crf_viterbi(p, sequences, reinterpret_cast<int64_t*>(paths.data), value.data, workspace.data, nullptr));
    write(paths, R * 8);
    write(value, B * C);
  } else if (op == kBest) {
    Memory paths(n * R * 8), scores(B * n * C), workspace(crf_viterbi_n_best_bytes(p, n));
    must(crf_viterbi_n_best(p, sequences, n, reinterpret_cast<int64_t*>(paths.data), scores.data, workspace.data,
                            nullptr));
    write(paths, n * R * 8);
    write(scores, B * n * C);
  } else {
    forward.left_only = true;
    run_forward(true);
    if (op == kSample) {
      Memory paths(n * R * 8);
      must(crf_sample(p, sequences, messages.data, reinterpret_cast<float*>(uniforms.data), n,
                      reinterpret_cast<int64_t*>(paths.data), nullptr));
      write(paths, n * R * 8);
    } else {
      must(crf_entropy(p, sequences, messages.data, value.data, nullptr));
      write(value, B * C);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  input = std::fopen(argv[1], "rb");
  output = std::fopen(argv[2], "wb");
  int64_t header[15];
  while (std::fread(header, 8, 15, input) == 15) run_case(header);
  std::fclose(output);
  return 0;
}
