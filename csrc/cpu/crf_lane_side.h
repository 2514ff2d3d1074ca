// The left or the right halves of eight sequences; the mathematics is at the top of crf_lanes.h.
#pragma once
#include "crf_lane_rows.h"
#include "crf_side.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

// Steps whose exponentials are taken together: none waits for another, while every product waits for the one before.
constexpr int kBlock = 8;

// The left or the right halves of up to eight sequences. Arrays are [N, 8] where nothing else is said.
template <bool SPREAD>
struct LaneSide : LaneRows {
  const Matrix<float> matrix;
  const float* products;  // of the matrix, and transposed, spread or not
  const float* transposed;
  int64_t stride;
  double shift[kLanes] = {};  // the message is p exp(shift)
  Mask8 failed = {};
  Mask8 exponent = {};  // p waits for a factor of 2 to this
  Float8 scale;         // r waits for this factor
  float *p, *r, *next;
  float* outer;      // demissions at the outer end of each half
  float* buffer;     // [8, N] rows of half precision
  float* zeros;      // [N], the message of a lane that has ended
  float* x;          // [8 steps, N, 8]
  Float8 d[kBlock];  // what x was divided by, as a logarithm
  float* p_rows;     // [16, N, 8], as in crf_side.h
  float* w_rows;
  float* pairs;  // [N, N, 8]
  int64_t pending = 0;
  bool paired = false;  // pairs hold something

  static int64_t elements(int64_t n) {
    return (6 + kBlock + 2 * kPending + n) * n * kLanes + (SPREAD ? 2 * n * n * kLanes : 0);
  }

  LaneSide(const CrfWork& w, const CrfSequence* s, int count, Part part, const Matrix<float>& matrix, int64_t padded,
           float* memory)
      : LaneRows(w, s, count, part),
        matrix(matrix),
        products(matrix.products),
        transposed(matrix.transposed),
        stride(padded) {
    float** const all[] = {&p, &r, &next, &outer, &buffer, &zeros, &x};
    for (float** array : all) {
      *array = memory;
      memory += n * kLanes;
    }
    p_rows = memory + (kBlock - 1) * n * kLanes;
    w_rows = p_rows + kPending * n * kLanes;
    pairs = w_rows + kPending * n * kLanes;
    std::memset(zeros, 0, static_cast<size_t>(n) * sizeof(float));
    if (!SPREAD) return;
    float* const spread = pairs + n * n * kLanes;
    products = spread_matrix(matrix.products, n, padded, 1, spread);
    transposed = spread_matrix(matrix.products, n, 1, padded, spread + n * n * kLanes);
    stride = n * kLanes;
  }

  // x[slot] <- exp(e + top - d) of a step, and d = max_j.
  void weigh(int slot, int64_t step, bool from_middle, const float* top) {
    const int live = longer_than(step);
    const int64_t n = this->n;
    float* const to = x + slot * n * kLanes;
    read_emissions(step, from_middle, live, buffer, to);
    Float8 largest = splat(-INFINITY), sum = {};
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) {
      const Float8 f = load(to + j * kLanes) + splat(top[j]);
      store(to + j * kLanes, f);
      largest = maximum(f, largest);
      sum += f;
    }
    // NaN, +inf, or nothing but -inf
    failed |= ((sum != sum) | (largest - largest != Float8{})) & lanes_below<float>(live);
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) store(to + j * kLanes, exponential(load(to + j * kLanes) - largest));
    d[slot] = largest;
  }
  void weigh_block(int64_t first, bool from_middle) {
    for (int slot = 0; slot < kBlock && first + slot < lengths[0]; ++slot)
      weigh(slot, first + slot, from_middle, matrix.top);
  }

  void filter_first() {
    const void* boundary = forwards ? work.problem.start : work.problem.end;
    for (int64_t j = 0; j < n; ++j) next[j] = boundary ? static_cast<const float*>(boundary)[j] : 0;
    weigh(0, 0, false, next);
    std::memcpy(p, x, static_cast<size_t>(n * kLanes) * sizeof(float));
    for (int l = 0; l < kLanes; ++l) shift[l] = d[0][l];
    write_message(0, count);
  }
  // p <- that of `step`, which has been weighed into the slot.
  void filter_step(int slot, int64_t step) {
    const int live = longer_than(step);
    const Mask8 lanes = lanes_below<float>(live);
    const int64_t n = this->n;
    const float* const weight = x + slot * n * kLanes;
    const float* const p = this->p;
    float* const next = this->next;
    const Float8 factor = (Float8)((exponent + 127) << 23);
    dot_lanes<SPREAD>(p, products, n, stride, next);
    Float8 largest = {};
    Float8 least = splat(1.0f);
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) {
      const Float8 sum = load(next + j * kLanes);
      const Float8 moved = sum * (load(weight + j * kLanes) * factor);
      least = minimum(sum, least);
      largest = maximum(moved, largest);
      store(next + j * kLanes, moved);
    }
    failed |= (least < splat(static_cast<float>(kGuard))) & lanes;
    if (live < count)
      for (int64_t j = 0; j < n; ++j) store(next + j * kLanes, lanes ? load(next + j * kLanes) : load(p + j * kLanes));
    const Float8 moved = lanes ? d[slot] : Float8{};
    const Mask8 halved = exponent & lanes;
    for (int l = 0; l < kLanes; ++l) shift[l] += moved[l] - halved[l] * 0.693147180559945309417;
    exponent = 127 - ((Mask8)largest >> 23);
    this->next = this->p;
    this->p = next;
    write_message(step, live);
  }
  void write_message(int64_t step, int live) const {
    if (work.messages) scatter(p, n, live, rows_of(messages, step, false, live));
  }
  // to <- the stored messages, 0 in lanes that have ended: their products are added to `pairs` like all others. A lane
  // whose message is kept as logarithms fails.
  void read_message(int64_t step, int live, float* to) {
    const int64_t n = this->n;
    Rows rows = rows_of(messages, step, true, live);
    for (int l = live; l < kLanes; ++l) rows.at[l] = reinterpret_cast<int64_t>(zeros);
    gather(rows, n, to);
    Mask8 negative = {};
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) negative |= (Mask8)load(to + j * kLanes);
    failed |= (negative < 0) & lanes_below<float>(live);
  }

  // demissions of a step from gamma = p r scale; the gold path counts +grad.
  void write_gradients(int64_t step, int live, const float* message, Float8 sign, const float* grad) {
    const Float8 factor = sign * scale;
    const int64_t n = this->n;
    const float* const r = this->r;
    float* const next = this->next;
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j)
      store(next + j * kLanes, load(message + j * kLanes) * (load(r + j * kLanes) * factor));
    const Rows own = rows_of(demissions, step, true, live);
    Rows rows = own;
    if (narrow)
      for (int l = 0; l < live; ++l) rows.at[l] = reinterpret_cast<int64_t>(buffer + l * n);
    scatter(next, n, live, rows);
    if (work.tags) {
      const Rows gold = rows_of(tags, step, true, live);
      for (int l = 0; l < live; ++l) {
        const int64_t tag = *gold.row<const int64_t>(l);
        if (static_cast<uint64_t>(tag) < static_cast<uint64_t>(n)) rows.row<float>(l)[tag] += grad[l];
      }
    }
    for (int l = longer_than(step + 1); l < live; ++l)
      for (int64_t j = 0; j < n; ++j) outer[j * kLanes + l] = rows.row<float>(l)[j];
    for (int l = 0; narrow && l < live; ++l) {
      const int64_t row = (own.at[l] - demissions.zero.at[l]) / demissions.bytes;
      store_emissions_grad(work.problem, work.demissions, row, buffer + l * n);
    }
  }

  // From x (the share of the emissions in w) and r of the step nearer to the middle: r and gamma of `step`.
  void smooth_step(int slot, int64_t step, Float8 sign, const float* grad) {
    const int live = longer_than(step);
    const Mask8 lanes = lanes_below<float>(live);
    const int64_t n = this->n;
    const Float8 scale = this->scale;
    float* const r = this->r;
    float* const weight = x + slot * n * kLanes;
    float* const message = p_rows + pending * n * kLanes;
    float* const w = w_rows + pending * n * kLanes;
    read_message(step, live, message);
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) store(weight + j * kLanes, load(weight + j * kLanes) * load(r + j * kLanes));
    dot_lanes<SPREAD>(weight, transposed, n, stride, r);
    Float8 sum = {};
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) {
      const Float8 moved = load(r + j * kLanes) * scale;
      store(r + j * kLanes, moved);
      sum += load(message + j * kLanes) * moved;
    }
    const Mask8 usable = (sum > splat(1e-24f)) & (sum < splat(1e30f));
    failed |= ~usable & lanes;
    const Float8 inverse = splat(1.0f) / sum;
    if (work.transition_grad) {
      const Float8 both = scale * inverse;
      const Mask8 counted = usable & lanes;  // the numbers of other lanes may be inf or NaN
#pragma GCC unroll 4
      for (int64_t j = 0; j < n; ++j) store(w + j * kLanes, masked(load(weight + j * kLanes) * both, counted));
    }
    this->scale = inverse;
    write_gradients(step, live, message, sign, grad);
    if (work.transition_grad && ++pending == kPending) add_pending();
  }

  // pairs_ij += sum of p_i w_j over the pending steps, in blocks of up to 4 x 3 sums, which fill the registers.
  void add_pending() {
    for (int64_t i = 0, rows; i < n; i += rows) {
      rows = (n - i + (n - i + 3) / 4 - 1) / ((n - i + 3) / 4);
      switch (rows) {
        case 4: add_rows<4>(i); break;
        case 3: add_rows<3>(i); break;
        case 2: add_rows<2>(i); break;
        default: add_rows<1>(i); break;
      }
    }
    pending = 0;
    paired = true;
  }
  template <int I>
  FASTNLP_MEMBER void add_rows(int64_t i) {
    int64_t j = 0;
    for (; j + 3 <= n; j += 3) add_block<I, 3>(i, j);
    if (n - j == 2) add_block<I, 2>(i, j);
    if (n - j == 1) add_block<I, 1>(i, j);
  }
  template <int I, int J>
  FASTNLP_MEMBER void add_block(int64_t i, int64_t j) {
    const int64_t n = this->n, pending = this->pending;
    Float8 block[I][J] = {};
    float* const to = pairs + (i * n + j) * kLanes;
    for (int a = 0; a < I && paired; ++a)
      for (int b = 0; b < J; ++b) block[a][b] = load(to + (a * n + b) * kLanes);
    const float* message = p_rows + i * kLanes;
    const float* w = w_rows + j * kLanes;
    for (int64_t u = 0; u < pending; ++u) {
      for (int a = 0; a < I; ++a)
        for (int b = 0; b < J; ++b) block[a][b] += load(message + a * kLanes) * load(w + b * kLanes);
      message += n * kLanes;
      w += n * kLanes;
    }
    for (int a = 0; a < I; ++a)
      for (int b = 0; b < J; ++b) store(to + (a * n + b) * kLanes, block[a][b]);
  }

  // The sums over all lanes but the failed ones.
  void add_sums(Float8 sign, Mask8 usable, int64_t padded, const CrfSums& sums) {
    for (int64_t i = 0; work.transition_grad && i < n; ++i)
      for (int64_t j = 0; j < n; j += kLanes) {
        Float8 cells[kLanes];
        for (int64_t c = 0; c < kLanes; ++c)
          cells[c] = j + c < n ? usable ? load(pairs + (i * n + j + c) * kLanes) * sign : Float8{} : Float8{};
        transpose(cells);
        const Float8 total =
            (((cells[0] + cells[1]) + (cells[2] + cells[3])) + ((cells[4] + cells[5]) + (cells[6] + cells[7]))) *
            load(matrix.products + i * padded + j);
        for (int64_t c = 0; c < kLanes && j + c < n; ++c)
          sums.transitions[forwards ? i * n + j + c : (j + c) * n + i] += total[c];
      }
    double* const boundary = forwards ? sums.start : sums.end;
    for (int64_t j = 0; j < n; ++j) {
      const Float8 own = load(outer + j * kLanes);
      boundary[j] += sum_of(usable ? own : Float8{});
    }
  }
};

}  // namespace
}  // namespace FASTNLP_ISA
}  // namespace fastnlp
