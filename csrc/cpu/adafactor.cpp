// One step of Adafactor over rows of a matrix or elements of a vector (the mathematics: csrc/adafactor.h). Sums over a
// strip of rows are kept in C, over strips and wide blocks in double; they are added in an order that follows from the
// shapes alone.
#include "adafactor.h"

#include "adafactor_loops.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

template <class C, class P, class G>
struct Kernel {
  const AdafactorItem& item;
  const AdafactorTensor& t = *item.tensor;
  const AdafactorGroup& group = *item.group;
  const int64_t n = t.cols;
  const int64_t padded = padded_row<C>(n);
  const bool product = group.layer_adaptation != 0;
  const bool torch_mode = group.torch_mode != 0;
  const bool needs_param = torch_mode || product || group.scale_parameter != 0;
  const double grad = item.step.grad;
  C* const sums = static_cast<C*>(item.sums);

  C* columns(int64_t b) const { return sums + t.columns_at + b * adafactor_columns(n, product); }
  C& row_factors(int64_t b) const { return columns(b)[(product ? 3 : 2) * n]; }
  C& clamped(int64_t b) const { return columns(b)[(product ? 3 : 2) * n + 1]; }
  C* row_sums(int64_t b) const { return sums + t.rows_at + b * t.rows; }
  C* row_state(int64_t b) const { return static_cast<C*>(t.row) + b * t.rows; }

  C row_factor(int64_t b, int64_t i) const {
    const double mean = grad * grad * row_sums(b)[i] / static_cast<double>(t.whole_cols);
    return static_cast<C>(item.step.beta2 * row_state(b)[i] + item.step.fresh * (mean + item.step.floor));
  }
  // What the product of the factors is divided by.
  double divisor(int64_t b) const {
    const int64_t count = t.transposed ? t.whole_cols : t.whole_rows;
    const double mean = static_cast<double>(row_factors(b)) / static_cast<double>(count);
    return torch_mode && mean < group.eps1 ? group.eps1 : mean;
  }
  // sqrt(D / R): of a row without any gradient 0, which the clamp of torch mode wants to be infinite.
  C row_scale(int64_t b, C factor) const {
    if (factor == 0) return clamped(b) != 0 ? static_cast<C>(INFINITY) : 0;
    return static_cast<C>(std::sqrt(divisor(b) / factor));
  }
  C limit(int64_t b) const { return static_cast<C>(clamped(b) != 0 ? 1 / group.eps1 : INFINITY); }

  // Room for the rows of a strip that do not lie adjacent in memory.
  struct Rooms {
    G* grad[kRows];
    P* param;
    C* moment;
    C* average;
    C* columns;
  };
  static size_t room_size(int64_t padded) { return static_cast<size_t>(padded) * sizeof(double); }
  static Rooms rooms(void* scratch, int64_t padded) {
    char* at = static_cast<char*>(scratch);
    const auto next = [&] {
      char* room = at;
      at += room_size(padded);
      return room;
    };
    Rooms r;
    for (G*& room : r.grad) room = reinterpret_cast<G*>(next());
    r.param = reinterpret_cast<P*>(next());
    r.moment = reinterpret_cast<C*>(next());
    r.average = reinterpret_cast<C*>(next());
    r.columns = reinterpret_cast<C*>(next());
    return r;
  }

  const G* grad_row(int64_t matrix, int64_t i, G* room) const {
    return adjacent_row<G>(t.grad.data, t.grad_dtype, matrix + i * t.grad.row_stride, t.grad.col_stride, n, room);
  }
  template <class T>
  const T* row(const AdafactorView& view, int64_t matrix, int64_t i, T* room) const {
    return adjacent_row<T>(view.data, TypeOf<T>::dtype, matrix + i * view.row_stride, view.col_stride, n, room);
  }

  void accumulate(int64_t phases, int64_t b, int64_t begin, int64_t end, C* into, void* scratch,
                  AdafactorTotals& totals) const {
    const bool own_rows = phases & kAdafactorRows, own_columns = phases & kAdafactorColumns;
    const Rooms room = rooms(scratch, padded);
    const int64_t grads = adafactor_matrix(t, t.grad, b), params = adafactor_matrix(t, t.param, b);
    if (own_columns) std::fill(into, into + (product ? 3 : 2) * padded, C(0));
    for (int64_t i = begin; i < end; i += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, end - i));
      const G* g[kRows];
      C weights[kRows], roots[kRows];
      for (int k = 0; k < count; ++k) {
        g[k] = grad_row(grads, i + k, room.grad[k]);
        if (own_rows) {
          const double sum = sum_of_squares<C>(g[k], n);
          row_sums(b)[i + k] = static_cast<C>(sum);
          totals.grad_squares += sum;
        }
        if (!own_columns) continue;
        const C factor = row_factor(b, i + k);
        totals.row_factors += factor;
        weights[k] = factor == 0 ? C(0) : static_cast<C>(grad * grad / factor);
        roots[k] = factor == 0 ? C(0) : static_cast<C>(grad / std::sqrt(static_cast<double>(factor)));
      }
      if (own_columns && count == kRows) {
        const RowsAhead<C, G> next = {static_cast<const G*>(t.grad.data) + grads + (i + kRows) * t.grad.row_stride,
                                      t.grad.row_stride};
        const RowsAhead<C, P> own = {static_cast<const P*>(t.param.data) + params + i * t.param.row_stride,
                                     t.param.row_stride};
        add_columns<kRows>(g, weights, n, into, into + padded, [&](int64_t j) {
          next.ask(j);
          if (needs_param) own.ask(j);
        });
      } else if (own_columns)
        for (int k = 0; k < count; ++k) add_columns<1>(g + k, weights + k, n, into, into + padded, [](int64_t) {});
      if (!needs_param) continue;
      for (int k = 0; k < count; ++k) {
        const P* p = row<P>(t.param, params, i + k, room.param);
        if (own_rows) totals.param_squares += sum_of_squares<C>(p, n);
        if (own_columns && product) add_product(g[k], p, roots[k], n, into + 2 * padded);
      }
    }
  }

  void reduce(int64_t b, const C* strips, int64_t count, double factors) const {
    const int64_t parts = product ? 3 : 2;
    C* to = columns(b);
    constexpr int64_t tile = 256;
    double sum[tile];
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t first = 0; first < n; first += tile) {
        const int64_t width = std::min(tile, n - first);
        std::fill(sum, sum + width, 0.0);
        for (int64_t s = 0; s < count; ++s) {
          const C* from = strips + (s * parts + part) * padded + first;
          for (int64_t j = 0; j < width; ++j) sum[j] += from[j];
        }
        for (int64_t j = 0; j < width; ++j) to[part * n + first + j] = static_cast<C>(sum[j]);
      }
    row_factors(b) = static_cast<C>(factors);
    clamped(b) = 0;
  }

  void norms(int64_t b, AdafactorTotals& totals) const {
    C* cs = columns(b);
    C* w = cs + n;
    const C* x = product ? w + n : nullptr;
    const C* state = static_cast<const C*>(t.col) + b * n;
    const C beta2 = static_cast<C>(item.step.beta2), floor = static_cast<C>(item.step.fresh * item.step.floor);
    const C scale = static_cast<C>(item.step.fresh * grad * grad / static_cast<double>(t.whole_rows));
    double update = 0, cross = 0, factors = 0;
    C least = static_cast<C>(INFINITY);  // of the columns that have a gradient
    for (int64_t j = 0; j < n; ++j) {
      const C factor = beta2 * state[j] + (scale * cs[j] + floor);
      const C root = factor == 0 ? C(0) : 1 / std::sqrt(factor);
      least = cs[j] != 0 && factor < least ? factor : least;
      factors += factor;
      update += factor == 0 ? 0.0 : static_cast<double>(w[j] / factor);
      if (product) cross += static_cast<double>(x[j] * root);
      cs[j] = factor;
      w[j] = root;
    }
    if (t.transposed) row_factors(b) = static_cast<C>(factors);
    if (torch_mode && (item.sharded || clamps(b, static_cast<double>(least)))) {
      clamped(b) = 1;
      for (int64_t j = 0; j < n; ++j)
        if (cs[j] == 0) w[j] = static_cast<C>(INFINITY);
      return;  // exact() sums over the elements
    }
    const double d = divisor(b);
    totals.update_squares += d * update;
    totals.product += std::sqrt(d) * cross;
  }

  // Whether torch mode's clamp of the variances at eps1^2 can change an element whose gradient is not 0.
  bool clamps(int64_t b, double least_column) const {
    double least = INFINITY;
    for (int64_t i = 0; i < t.rows; ++i) {
      if (row_sums(b)[i] == 0) continue;
      const double factor = row_factor(b, i);
      if (factor < least) least = factor;
    }
    return least * least_column / divisor(b) < group.eps1 * group.eps1;
  }

  // Sum U^2 and sum U p of a clamped matrix.
  void exact(int64_t b, int64_t begin, int64_t end, void* scratch, AdafactorTotals& totals) const {
    if (clamped(b) == 0) return;
    const Rooms room = rooms(scratch, padded);
    const int64_t grads = adafactor_matrix(t, t.grad, b), params = adafactor_matrix(t, t.param, b);
    const C* column = columns(b) + n;
    for (int64_t i = begin; i < end; ++i) {
      const G* g = grad_row(grads, i, room.grad[0]);
      const P* p = product ? row<P>(t.param, params, i, room.param) : nullptr;
      const C scale = row_scale(b, row_factor(b, i)), most = limit(b);
      double squares = 0, cross = 0;
      for (int64_t j = 0; j < n; ++j) {
        const C factor = scale * column[j];
        const double u = grad * static_cast<double>(static_cast<C>(g[j]) * (factor > most ? most : factor));
        squares += u * u;
        if (product) cross += u * static_cast<double>(static_cast<C>(p[j]));
      }
      totals.update_squares += squares;
      totals.product += cross;
    }
  }

  void apply(int64_t b, int64_t begin, int64_t end, void* scratch) const {
    const Rooms room = rooms(scratch, padded);
    const int64_t grads = adafactor_matrix(t, t.grad, b), params = adafactor_matrix(t, t.param, b);
    const int64_t moments = adafactor_matrix(t, t.moment, b), averages = adafactor_matrix(t, t.average, b);
    const C* column = columns(b) + n;
    if (begin == 0) std::copy(columns(b), columns(b) + n, static_cast<C*>(t.col) + b * n);
    Update<C> u = update();
    u.limit = limit(b);
    Dither random{item.key, t.per_col};
    const auto begin_row = [&](int64_t i) {
      const C factor = row_factor(b, i);
      u.still = group.lazy != 0 && row_sums(b)[i] == 0;
      u.row = row_scale(b, factor);
      row_state(b)[i] = factor;
    };
    int64_t i = begin;
    if (!t.moment.data && !t.average.data && !u.dither && u.limit == static_cast<C>(INFINITY) && group.lazy == 0 &&
        t.param.col_stride == 1 && t.grad.col_stride == 1 && t.grad_dtype == TypeOf<G>::dtype) {
      // Rows far apart are streams of their own for the machine's prefetcher; rows that touch would be one.
      P* p[kRows];
      const G* g[kRows];
      C factors[kRows];
      const auto take = [&](int64_t row, int k) {
        begin_row(row);
        p[k] = static_cast<P*>(t.param.data) + params + row * t.param.row_stride;
        g[k] = static_cast<const G*>(t.grad.data) + grads + row * t.grad.row_stride;
        factors[k] = u.gain * u.row;
      };
      const int64_t apart = (end - begin) / kRows;
      for (; i < begin + apart; ++i) {
        for (int k = 0; k < kRows; ++k) take(i + k * apart, k);
        update_plainly<kRows>(u.keep, factors, p, g, column, n);
      }
      for (i = begin + kRows * apart; i < end; ++i) {
        take(i, 0);
        update_plainly<1>(u.keep, factors, p, g, column, n);
      }
    }
    for (; i < end; ++i) {
      begin_row(i);
      u.first = t.first + static_cast<uint64_t>(b) * t.per_batch + static_cast<uint64_t>(i) * t.per_row;
      const G* g = grad_row(grads, i, room.grad[0]);
      P* p = const_cast<P*>(row<P>(t.param, params, i, room.param));
      C* m = t.moment.data ? const_cast<C*>(row<C>(t.moment, moments, i, room.moment)) : nullptr;
      C* e = t.average.data ? const_cast<C*>(row<C>(t.average, averages, i, room.average)) : nullptr;
      update_fully(u, random, p, g, column, m, e, n);
      if (m == room.moment) put_back(t.moment, moments, i, m);
      if (e == room.average) put_back(t.average, averages, i, e);
      if (p == room.param) put_back(t.param, params, i, p);
    }
  }
  template <class T>
  void put_back(const AdafactorView& view, int64_t matrix, int64_t i, const T* from) const {
    scatter_row(static_cast<T*>(view.data) + matrix + i * view.row_stride, view.col_stride, n, from);
  }

  Update<C> update() const {
    Update<C> u{};
    u.keep = static_cast<C>(item.gain.keep);
    u.gain = static_cast<C>(item.gain.gain * grad);
    u.limit = static_cast<C>(INFINITY);
    u.beta1 = static_cast<C>(group.beta1);
    u.fresh = static_cast<C>(1 - group.average_decay);
    u.dither = group.stochastic != 0;
    return u;
  }

  // Vectors, in blocks. `scale` becomes 1 / sqrt(V) of the new variance V, clamped in torch mode.
  void scale_block(int64_t first, int64_t count, const G* g, C* variance, C* scale) const {
    const C beta2 = static_cast<C>(item.step.beta2), fresh = static_cast<C>(item.step.fresh * grad * grad);
    const C floor = static_cast<C>(item.step.fresh * item.step.floor);
    const C least = torch_mode ? static_cast<C>(group.eps1 * group.eps1) : C(0);
    const C* state = static_cast<const C*>(t.row) + first;
    for (int64_t j = 0; j < count; ++j) {
      const C x = static_cast<C>(g[j]);
      const C v = beta2 * state[j] + (fresh * (x * x) + floor);
      const C clamped = v < least ? least : v;
      if (variance) variance[j] = v;
      scale[j] = clamped == 0 ? C(0) : 1 / std::sqrt(clamped);
    }
  }

  void accumulate_vector(int64_t phases, int64_t begin, int64_t end, void* scratch, AdafactorTotals& totals) const {
    const Rooms room = rooms(scratch, kBlock);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      const G* g = elements<G>(t.grad, t.grad_dtype, first, count, room.grad[0]);
      const P* p = needs_param ? elements<P>(t.param, t.param_dtype, first, count, room.param) : nullptr;
      if (phases & kAdafactorRows) {
        totals.grad_squares += sum_of_squares<C>(g, count);
        if (p) totals.param_squares += sum_of_squares<C>(p, count);
      }
      if (!(phases & kAdafactorColumns)) continue;
      scale_block(first, count, g, nullptr, room.columns);
      double squares = 0, cross = 0;
      for (int64_t j = 0; j < count; ++j) {
        const double u = grad * static_cast<double>(static_cast<C>(g[j]) * room.columns[j]);
        squares += u * u;
        if (product) cross += u * static_cast<double>(static_cast<C>(p[j]));
      }
      totals.update_squares += squares;
      totals.product += cross;
    }
  }

  void apply_vector(int64_t begin, int64_t end, void* scratch) const {
    const Rooms room = rooms(scratch, kBlock);
    Update<C> u = update();
    u.row = 1;
    Dither random{item.key, t.per_col};
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      const G* g = elements<G>(t.grad, t.grad_dtype, first, count, room.grad[0]);
      P* p = const_cast<P*>(elements<P>(t.param, t.param_dtype, first, count, room.param));
      scale_block(first, count, g, static_cast<C*>(t.row) + first, room.columns);
      u.first = t.first + static_cast<uint64_t>(first) * t.per_col;
      if (!t.moment.data && !t.average.data && !u.dither) {
        update_plainly<1>(u.keep, &u.gain, &p, &g, room.columns, count);
      } else {
        C* m = t.moment.data ? const_cast<C*>(elements<C>(t.moment, TypeOf<C>::dtype, first, count, room.moment))
                             : nullptr;
        C* e = t.average.data ? const_cast<C*>(elements<C>(t.average, TypeOf<C>::dtype, first, count, room.average))
                              : nullptr;
        update_fully(u, random, p, g, room.columns, m, e, count);
        if (m == room.moment) scatter_row(at<C>(t.moment, first), t.moment.col_stride, count, m);
        if (e == room.average) scatter_row(at<C>(t.average, first), t.average.col_stride, count, e);
      }
      if (p == room.param) scatter_row(at<P>(t.param, first), t.param.col_stride, count, p);
    }
  }
  template <class T>
  static T* at(const AdafactorView& view, int64_t first) {
    return static_cast<T*>(view.data) + first * view.col_stride;
  }
  template <class T>
  static const T* elements(const AdafactorView& view, DType dtype, int64_t first, int64_t count, T* room) {
    return adjacent_row<T>(view.data, dtype, first * view.col_stride, view.col_stride, count, room);
  }
};

template <class C, class P, class G>
AdafactorKernels table() {
  using K = Kernel<C, P, G>;
  AdafactorKernels kernels;
  kernels.padded = padded_row<C>;
  kernels.scratch = [](const AdafactorItem& item) -> size_t {
    const int64_t width = item.tensor->factored ? padded_row<C>(item.tensor->cols) : kBlock;
    return (kRows + 6) * K::room_size(width);
  };
  kernels.accumulate = [](const AdafactorItem& item, int64_t phases, int64_t b, int64_t begin, int64_t end,
                          void* columns, void* scratch, AdafactorTotals& totals) {
    const K kernel{item};
    C* into = columns ? static_cast<C*>(columns) : kernel.rooms(scratch, kernel.padded).columns;
    kernel.accumulate(phases, b, begin, end, into, scratch, totals);
    if (!columns && phases & kAdafactorColumns) kernel.reduce(b, into, 1, totals.row_factors);
  };
  kernels.reduce = [](const AdafactorItem& item, int64_t b, const void* columns, int64_t strips, double factors) {
    K{item}.reduce(b, static_cast<const C*>(columns), strips, factors);
  };
  kernels.norms = [](const AdafactorItem& item, int64_t b, AdafactorTotals& totals) { K{item}.norms(b, totals); };
  kernels.exact = [](const AdafactorItem& item, int64_t b, int64_t begin, int64_t end, void* scratch,
                     AdafactorTotals& totals) { K{item}.exact(b, begin, end, scratch, totals); };
  kernels.apply = [](const AdafactorItem& item, int64_t b, int64_t begin, int64_t end, void* scratch) {
    K{item}.apply(b, begin, end, scratch);
  };
  kernels.accumulate_vector = [](const AdafactorItem& item, int64_t phases, int64_t begin, int64_t end, void* scratch,
                                 AdafactorTotals& totals) {
    K{item}.accumulate_vector(phases, begin, end, scratch, totals);
  };
  kernels.apply_vector = [](const AdafactorItem& item, int64_t begin, int64_t end, void* scratch) {
    K{item}.apply_vector(begin, end, scratch);
  };
  return kernels;
}

}  // namespace

// Gradients of a type that is not among these are widened row by row.
AdafactorKernels adafactor_kernels(DType param, DType grad) {
  switch (param) {
    case DType::f64: return table<double, double, double>();
    case DType::f16: return grad == DType::f16 ? table<float, Half, Half>() : table<float, Half, float>();
    case DType::bf16: return grad == DType::bf16 ? table<float, BFloat16, BFloat16>() : table<float, BFloat16, float>();
    default:
      if (grad == DType::f16) return table<float, float, Half>();
      if (grad == DType::bf16) return table<float, float, BFloat16>();
      return table<float, float, float>();
  }
}

}  // namespace FASTNLP_ISA
}  // namespace fastnlp
