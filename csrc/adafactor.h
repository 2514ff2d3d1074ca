// One step of Adafactor over many parameters, described without torch: what the CPU kernels (csrc/cpu/adafactor.cpp)
// and the CUDA kernels (csrc/cuda/adafactor.cu) both take, and the scalar formulas that they share.
//
// With row factors R_i and column factors C_j (of the new state), the update is U_ij = g_ij / sqrt(R_i C_j / D) with
// D = mean(R). Its square sums up without an own pass over the gradient: while a row is in cache its sum is completed
// first, hence R_i is known when the row enters the column sums
//     cs_j = sum_i g_ij^2,  W_j = sum_i g_ij^2 / R_i,  X_j = sum_i g_ij p_ij / sqrt(R_i),
// and then sum U^2 = D sum_j W_j / C_j and sum U p = sqrt(D) sum_j X_j / sqrt(C_j). The gradient is read twice: for
// these sums, and for the update.
#pragma once
#include <cmath>
#include <cstdint>

#include "dtype.h"

#if defined(__CUDACC__) || defined(FASTNLP_EMULATION)
#define FASTNLP_SHARED __host__ __device__ static inline
#else
#define FASTNLP_SHARED static inline
#endif

namespace fastnlp {

// The numbers of one group, in the order of the op's argument `options`.
struct AdafactorGroup {
  double torch_mode;  // 0: transformers, 1: torch.optim
  double eps1;
  double eps2;
  double clip_threshold;
  double decay;
  double beta1;  // below 0: no momentum
  double weight_decay;
  double scale_parameter;
  double relative_step;  // 0: no, 1: at most 1e-2, 2: warm-up from 1e-6
  double maximize;
  double layer_adaptation;
  double lazy;
  double average_decay;  // below 0: no average
  double stochastic;     // rounding of bfloat16 and float16 parameters
  double lr_scale;       // factor of the learning rate, relative steps included
};
constexpr int64_t kAdafactorOptions = sizeof(AdafactorGroup) / sizeof(double);

// What one call does, as bits: a caller that reduces `sums` between ranks makes several calls. 0: arguments are
// checked.
enum AdafactorPhase : int64_t {
  kAdafactorRows = 1,     // row sums, sum p^2, sum g^2
  kAdafactorColumns = 2,  // column sums, from complete row sums
  kAdafactorNorms = 4,    // new column factors and sum U^2, from complete column sums
  kAdafactorApply = 8,    // state and parameters
  kAdafactorAll = 15,
};

constexpr int kAdafactorBatchDims = 6;

// One tensor of a parameter's shape [batch..., rows, cols]. Strides count elements, not bytes.
struct AdafactorView {
  void* data;  // null: the parameter has none
  int64_t row_stride;
  int64_t col_stride;
  int64_t batch_stride[kAdafactorBatchDims];
};

// C is the compute type: double where the parameters are double, else float. A vector (nothing to factor) has rows = 1.
// A parameter whose rows are not adjacent in memory but whose columns are is described transposed: rows and cols,
// row and col change places.
struct AdafactorTensor {
  AdafactorView param;
  AdafactorView grad;
  AdafactorView moment;   // C
  AdafactorView average;  // C
  void* row;              // C [batch, rows]; the variance of a vector
  void* col;              // C [batch, cols]; null for a vector
  int64_t batch_size[kAdafactorBatchDims];
  int64_t batch;  // product of batch_size
  int64_t rows;
  int64_t cols;
  DType param_dtype;
  DType grad_dtype;
  int32_t group;
  bool factored;
  bool transposed;  // the mean that normalises is that of `col`

  // The whole tensor, of which this may be a rank's share. In the order of this description, transposed or not.
  int64_t whole_numel;
  int64_t whole_rows;
  int64_t whole_cols;
  // Number of element (b, i, j) in the whole tensor: first + b * per_batch + i * per_row + j * per_col.
  uint64_t first;
  uint64_t per_batch;
  uint64_t per_row;
  uint64_t per_col;
  uint64_t id;

  int64_t columns_at;  // where the column sums and the row sums begin in `sums`
  int64_t rows_at;
};

// Elements between the starts of matrix 0 and matrix b. (On a GPU a 64-bit division is a call that spills registers.)
FASTNLP_SHARED int64_t adafactor_matrix(const AdafactorTensor& tensor, const AdafactorView& view, int64_t b) {
  auto left = static_cast<uint32_t>(b);
  int64_t at = 0;
  for (int d = kAdafactorBatchDims - 1; d >= 0 && left > 0; --d) {
    const auto size = static_cast<uint32_t>(tensor.batch_size[d]);
    at += static_cast<int64_t>(left % size) * view.batch_stride[d];
    left /= size;
  }
  return at;
}

// `sums` begins with sum g^2 of the call, then three numbers of each tensor.
enum AdafactorSum { kSumParam = 0, kSumUpdate = 1, kSumProduct = 2 };
FASTNLP_SHARED int64_t adafactor_sum(int64_t tensor, AdafactorSum which) { return 1 + 3 * tensor + which; }

// Column sums of one matrix: cs, W, then X where the group has layer adaptation, then sum R and a flag. kAdafactorNorms
// leaves C in the place of cs, 1 / sqrt(C) in that of W.
FASTNLP_SHARED int64_t adafactor_columns(int64_t cols, bool product) { return (product ? 3 : 2) * cols + 2; }

// The scalars of one tensor in one step, before anything has been summed.
struct AdafactorScalars {
  double beta2;
  double fresh;  // 1 - beta2
  double floor;  // added to the means of g^2
  double lr;     // before the scale of the parameter
  double decay;  // torch mode's weight decay
  double grad;   // factor of the gradient, sign included
};

FASTNLP_SHARED AdafactorScalars adafactor_scalars(const AdafactorGroup& group, double step, double lr,
                                                  double grad_factor) {
  AdafactorScalars s;
  const bool torch_mode = group.torch_mode != 0;
  s.fresh = pow(step, group.decay);
  s.beta2 = 1 - s.fresh;
  s.floor = torch_mode ? 0 : group.eps1;
  const double relative = 1 / sqrt(step);
  const double most = torch_mode ? lr : group.relative_step == 2 ? 1e-6 * step : 1e-2;
  s.lr = torch_mode || group.relative_step != 0 ? (most < relative ? most : relative) : lr;
  s.lr *= group.lr_scale;
  s.decay = group.weight_decay * lr * group.lr_scale;
  s.grad = group.maximize != 0 ? -grad_factor : grad_factor;
  return s;
}

// What turns U into the change of the parameter: p <- keep p - gain U.
struct AdafactorGain {
  double keep;
  double gain;
  double rms;  // of the parameter before the step
};

FASTNLP_SHARED AdafactorGain adafactor_gain(const AdafactorGroup& group, const AdafactorScalars& step, double numel,
                                            double param_squares, double update_squares, double product) {
  AdafactorGain g;
  const bool torch_mode = group.torch_mode != 0;
  g.rms = sqrt(param_squares / numel);
  double alpha = step.lr;
  if (torch_mode || group.scale_parameter != 0) alpha *= g.rms > group.eps2 ? g.rms : group.eps2;
  double decay = torch_mode ? step.decay : group.weight_decay * alpha;
  const double over = sqrt(update_squares / numel) / group.clip_threshold;
  // Of a NaN torch's Python max() makes 1, transformers' clamp a NaN.
  g.gain = over > 1 || (over != over && !torch_mode) ? alpha / over : alpha;
  if (group.layer_adaptation != 0) {
    // Rounded sums lose twice the digits where update and decay cancel, as they may in a tensor of one number: its norm
    // needs no sum of three.
    const double along = g.gain * product + decay * param_squares;
    const double change = numel == 1 && decay != 0
                              ? along * along / param_squares
                              : g.gain * g.gain * update_squares + g.gain * decay * product + decay * along;
    const double ratio = change > 0 && param_squares > 0 ? step.lr * sqrt(param_squares / change) : 1;
    g.gain *= ratio;
    decay *= ratio;
  }
  g.keep = 1 - decay;
  return g;
}

// The factor of clipping by the global norm, as torch.nn.utils.clip_grad_norm_ has it.
FASTNLP_SHARED double adafactor_clip(double max_norm, double norm) {
  const double factor = max_norm / (norm + 1e-6);
  return max_norm > 0 && !(factor > 1) ? factor : 1;
}

// Random bits of one element: they depend on (seed, step, id, number of the element) alone, so that every path (one
// process or many, one call for all parameters or one for each) rounds alike.
FASTNLP_SHARED uint64_t adafactor_mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
FASTNLP_SHARED uint32_t adafactor_mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
FASTNLP_SHARED uint64_t adafactor_key(uint64_t seed, uint64_t step, uint64_t id) {
  return adafactor_mix(adafactor_mix(adafactor_mix(seed + kGolden) + step + kGolden) + id + kGolden);
}
FASTNLP_SHARED uint64_t adafactor_key_of(uint64_t key, uint64_t number) {
  return adafactor_mix(key + (number >> 32) + kGolden);
}
FASTNLP_SHARED uint32_t adafactor_bits(uint64_t key_of_number, uint64_t number) {
  const uint32_t first = adafactor_mix(static_cast<uint32_t>(number) ^ static_cast<uint32_t>(key_of_number));
  return adafactor_mix(first ^ static_cast<uint32_t>(key_of_number >> 32));
}

}  // namespace fastnlp
