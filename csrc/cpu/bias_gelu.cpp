// SPDX-License-Identifier: Apache-2.0
// Bias and GeLU: formulas in tpcore/kernels.h, the distribution function in vector_math.h.
#include "parallel.h"
#include "types.h"
#include "vector_math.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

// gelu(z) = z gate(z). For the tanh formula the gate is logistic(argument(z)).
template <class A>
struct TanhArgument {
  Vec<A> near, slope, value;

  TPCORE_INLINE explicit TanhArgument(Vec<A> z) {
    using V = Vec<A>;
    const V linear(static_cast<A>(2 * kGeluTanhScale)),
        cubic(static_cast<A>(2 * kGeluTanhScale * kGeluTanhCubic));
    // Beyond 16 the gate is 0 or 1; a cube that overflows would make it NaN.
    near = smaller(V(A(16)), larger(V(A(-16)), z));
    const V square = near * near;
    slope = multiply_add(square, cubic * V(A(3)), linear);
    value = near * multiply_add(square, cubic, linear);
  }
};

// c z for the c of the old erf formula, in two parts: its rounding would be magnified.
template <class A>
struct OldScaled {
  Vec<A> value, low;

  TPCORE_INLINE explicit OldScaled(Vec<A> z) {
    const Vec<A> excess(static_cast<A>(kOldErfScale - 1));
    value = multiply_add(z, excess, z);
    low = multiply_add(z, excess, z - value);
  }
};

template <Gelu kind, class Precision, class A>
TPCORE_INLINE Vec<A> gate(Vec<A> z) {
  if (kind == Gelu::kTanh) return logistic(TanhArgument<A>(z).value);
  if (kind == Gelu::kErf) return normal_cdf<Precision>(z);
  using V = Vec<A>;  // beyond 16 the gate is 0 or 1, and an infinity has no two parts
  const OldScaled<A> scaled(smaller(V(A(16)), larger(V(A(-16)), z)));
  return normal_cdf<Precision>(scaled.value, scaled.value * scaled.low);
}

// Of z gate(z).
template <Gelu kind, class Precision, class A>
TPCORE_INLINE Vec<A> derivative(Vec<A> z) {
  if (kind == Gelu::kTanh) {
    const TanhArgument<A> argument(z);
    const Logistic<Vec<A>> gate = logistic_with_derivative(argument.value);
    return multiply_add(argument.near * argument.slope, gate.derivative, gate.value);
  }
  const Vec<A> scaled = kind == Gelu::kErf ? z : OldScaled<A>(z).value;
  const Normal<Vec<A>> distribution = normal<Precision>(scaled);
  return multiply_add(scaled, distribution.density, distribution.cdf);
}

template <Gelu kind>
struct Kind {
  static constexpr Gelu value = kind;
};

template <class Function>
void dispatch_gelu(Gelu gelu, const Function& function) {
  switch (gelu) {
    case Gelu::kErf:
      return function(Kind<Gelu::kErf>{});
    case Gelu::kTanh:
      return function(Kind<Gelu::kTanh>{});
    case Gelu::kOldErf:
      return function(Kind<Gelu::kOldErf>{});
  }
}

template <class T, class P, Gelu kind>
void forward_row(const T* x, const P* bias, T* y, int64_t columns) {
  using V = Vec<Acc<T>>;
  for_each_vector<V>(columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    V z = V::load(x + i, lanes);
    if (bias != nullptr) z = z + V::load(bias + i, lanes);
    (z * gate<kind, PrecisionOf<T>>(z)).store(y + i, lanes);
  });
}

template <class T, class P, Gelu kind>
void backward_row(const T* grad_y, const T* x, const P* bias, T* grad_x, Acc<T>* bias_sums,
                  int64_t columns) {
  using V = Vec<Acc<T>>;
  for_each_vector<V>(columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    V z = V::load(x + i, lanes);
    if (bias != nullptr) z = z + V::load(bias + i, lanes);
    const V grad = V::load(grad_y + i, lanes) * derivative<kind, PrecisionOf<T>>(z);
    if (grad_x != nullptr) grad.store(grad_x + i, lanes);
    if (bias_sums != nullptr) (V::load(bias_sums + i, lanes) + grad).store(bias_sums + i, lanes);
  });
}

}  // namespace

void bias_gelu_forward(const BiasGeluForward& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    dispatch_gelu(args.gelu, [&](auto kind) {
      const int64_t columns = args.columns;
      const int64_t bytes = columns * (2 * static_cast<int64_t>(sizeof(T)) + 8);
      parallel_rows(parallel_for, args.rows, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          forward_row<T, P, decltype(kind)::value>(
              row_of<T>(args.x, row), static_cast<const P*>(args.bias),
              static_cast<T*>(args.y) + row * columns, columns);
        }
      });
    });
  });
}

void bias_gelu_backward(const BiasGeluBackward& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    using A = Acc<T>;
    const int64_t columns = args.columns;
    A* partials = static_cast<A*>(args.partials);
    dispatch_gelu(args.gelu, [&](auto kind) {
      parallel_sums(parallel_for, args.rows, [&](int64_t sum, int64_t begin, int64_t end) {
        A* bias_sums = args.grad_bias ? partials + sum * columns : nullptr;
        if (bias_sums) memset(bias_sums, 0, static_cast<size_t>(columns) * sizeof(A));
        for (int64_t row = begin; row < end; ++row) {
          backward_row<T, P, decltype(kind)::value>(
              row_of<T>(args.grad_y, row), row_of<T>(args.x, row), static_cast<const P*>(args.bias),
              args.grad_x ? static_cast<T*>(args.grad_x) + row * columns : nullptr, bias_sums,
              columns);
        }
      });
    });
    add_partial_sums(parallel_for, partials, partial_sums(args.rows), columns, columns,
                     static_cast<A*>(args.grad_bias));
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
