// SPDX-License-Identifier: Apache-2.0
// Bias and GeLU: formulas in tpcore/kernels.h, coefficients in tpcore/math.h.
//
// Forward moves 2 s bytes per element, backward 3 s: the bias gradient is summed on the way. One
// exponential and one reciprocal per element serve the gate and its derivative. A thread owns the
// columns of one 16-byte vector, holds their bias in registers, and walks down the rows.
#include "columns.cuh"

namespace tpcore {
namespace cuda {
namespace {

// gelu(z) = z gate(z): the gate, and the derivative of z gate(z).
template <class A>
struct Gated {
  A gate, derivative;
};

// table[i] + x (table[i + 1] + x (.. )); the table is read when this is compiled.
template <const auto& table, int i = 0>
TPCORE_DEVICE float polynomial(float x) {
  constexpr float coefficient = table[i];
  if constexpr (i + 1 == sizeof(table) / sizeof(table[0])) {
    return coefficient;
  } else {
    return multiply_add(polynomial<table, i + 1>(x), x, coefficient);
  }
}

// The standard normal distribution and its density.
TPCORE_DEVICE void normal(float z, float* cdf, float* density) {
  const float t = fabsf(z) > 15.0f ? 15.0f : fabsf(z);  // beyond, the tail is 0; NaN stays
  const float square = t * t;
  float e = exponential(-0.5f * square);
  e = multiply_add(e, -0.5f * multiply_add(t, t, -square), e);  // what rounding the square lost
  const float u = reciprocal(multiply_add(t, kNormalTailSlope, 1.0f));
  const float tail = polynomial<kNormalTail>(u) * u * e;
  *cdf = z < 0.0f ? tail : 1.0f - tail;
  *density = e * kNormalDensity;
}

TPCORE_DEVICE void normal(double z, double* cdf, double* density) {
  *cdf = 0.5 * erfc(-z * kSqrtHalf);
  *density = exponential(-0.5 * z * z) * 0.3989422804014326779;
}

template <class A>
TPCORE_DEVICE Gated<A> gelu_erf(A z, A scale) {
  A cdf, density;
  normal(z * scale, &cdf, &density);
  return {cdf, multiply_add(z * scale, density, cdf)};
}

// (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), by the exponential that is at most 1: nothing cancels or
// overflows.
template <class A>
TPCORE_DEVICE Gated<A> gelu_tanh(A z) {
  constexpr A linear = static_cast<A>(2 * kGeluTanhScale);
  constexpr A cubic = static_cast<A>(2 * kGeluTanhScale * kGeluTanhCubic);
  // Beyond 16 the gate is 0 or 1; a cube that overflows would make it NaN.
  const A near = z > A(16) ? A(16) : z < A(-16) ? A(-16) : z;
  const A square = near * near;
  const A twice_u = near * multiply_add(square, cubic, linear);
  const A slope = multiply_add(square, 3 * cubic, linear);
  const A e = exponential(twice_u < 0 ? twice_u : -twice_u);
  const A upper = reciprocal(A(1) + e), lower = e * upper;
  const A gate = twice_u < 0 ? lower : upper;
  return {gate, multiply_add(near * slope, lower * upper, gate)};
}

// visit(i, gated) for every z[i]; the kind is the same for the whole grid.
template <class A, int N, class Visit>
TPCORE_DEVICE void for_each_gated(Gelu kind, const Vector<A, N>& z, const Visit& visit) {
  if (kind == Gelu::kTanh) {
#pragma unroll
    for (int i = 0; i < N; ++i) visit(i, gelu_tanh(z[i]));
  } else {
    const A scale = kind == Gelu::kErf ? A(1) : static_cast<A>(kOldErfScale);
#pragma unroll
    for (int i = 0; i < N; ++i) visit(i, gelu_erf(z[i], scale));
  }
}

template <class T, class P>
__global__ void __launch_bounds__(kTileThreads) forward(BiasGeluForward args) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  const int64_t begin = first_column<N>();
  if (begin >= args.columns) return;
  const Lanes lanes = lanes_at<N>(begin, args.columns);
  const Vector<A, N> bias = load_or<N>(static_cast<const P*>(args.bias), begin, lanes, A(0));

  for_each_row_of_run(args.rows, [&](int64_t row) {
    Vector<A, N> z = widen(load<N>(row_of<T>(args.x, row) + begin, lanes));
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] += bias[i];
    Vector<A, N> y;
    for_each_gated(args.gelu, z, [&](int i, const Gated<A>& gated) { y[i] = z[i] * gated.gate; });
    store(static_cast<T*>(args.y) + row * args.columns + begin, lanes, narrow<T>(y));
  });
}

template <class T, class P>
__global__ void __launch_bounds__(kTileThreads, 1) backward(BiasGeluBackward args) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ A scratch[kTileThreads * N];
  const int64_t begin = first_column<N>();
  const bool inside = begin < args.columns;
  const Lanes lanes = lanes_at<N>(begin, args.columns);
  const P* bias_row = inside ? static_cast<const P*>(args.bias) : nullptr;
  const Vector<A, N> bias = load_or<N>(bias_row, begin, lanes, A(0));
  T* grad_x = static_cast<T*>(args.grad_x);
  Vector<A, N> sums = filled<A, N>(0);

  for_each_row_of_run(inside ? args.rows : 0, [&](int64_t row) {
    const Packed<T, N> grad_y = load<N>(row_of<T>(args.grad_y, row) + begin, lanes);
    Vector<A, N> z = widen(load<N>(row_of<T>(args.x, row) + begin, lanes));
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] += bias[i];
    Vector<A, N> grad;
    for_each_gated(args.gelu, z, [&](int i, const Gated<A>& gated) {
      grad[i] = grad_y[i] * gated.derivative;
      sums[i] += grad[i];
    });
    if (grad_x != nullptr) store(grad_x + row * args.columns + begin, lanes, narrow<T>(grad));
  });
  if (args.grad_bias == nullptr) return;
  A* partial = static_cast<A*>(args.partials) + blockIdx.y * args.columns;
  add_over_rows(sums, scratch, partial, begin, args.columns);
}

}  // namespace

Status bias_gelu_forward(const BiasGeluForward& args, Stream stream) {
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  return dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    const ColumnGrid shape = column_grid(args.rows, args.columns, kVector<T>, kBlocksPerSm);
    return launch(forward<T, P>, shape.grid, shape.block, stream, args);
  });
}

Status bias_gelu_backward(const BiasGeluBackward& args, Stream stream) {
  if (args.columns == 0) return cudaSuccess;
  return dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) -> Status {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    int64_t sums = 0;
    if (args.rows > 0) {
      const ColumnGrid shape = column_grid(args.rows, args.columns, kVector<T>, kPartialsPerSm);
      const Status status = launch(backward<T, P>, shape.grid, shape.block, stream, args);
      if (status != cudaSuccess) return status;
      sums = shape.grid.y;
    }
    return launch_add_partials<Acc<T>>(args.partials, sums, args.columns, args.grad_bias, nullptr,
                                       false, stream);
  });
}

}  // namespace cuda
}  // namespace tpcore
