// SPDX-License-Identifier: Apache-2.0
// Bias and GeLU: formulas in tpcore/kernels.h, their evaluation in tpcore/math.h.
//
// Forward moves 2 s bytes per element, backward 3 s: the bias gradient is summed on the way. A
// thread owns the columns of one 16-byte vector, holds their bias in registers, and walks down the
// rows.
#include "columns.cuh"

namespace tpcore {
namespace cuda {
namespace {

template <class T>
using PrecisionOf = std::conditional_t<sizeof(T) == 2, Half, Single>;

// GeLU and its derivative: for float32 from tpcore/math.h, for float64 by their formulas.
template <Gelu kind, class Precision>
TPCORE_DEVICE float gelu(float value) {
  const Lane z(value);
  if constexpr (kind == Gelu::kTanh) return gelu_tanh<Precision>(z).value;
  return (kind == Gelu::kErf ? gelu_erf<Precision>(z) : gelu_old_erf<Precision>(z)).value;
}

template <Gelu kind, class Precision>
TPCORE_DEVICE float gelu_slope(float value) {
  if constexpr (kind == Gelu::kTanh) return gelu_tanh_slope<Precision>(Lane(value)).value;
  const float scale = kind == Gelu::kErf ? 1.0f : static_cast<float>(kOldErfScale);
  return gelu_erf_slope<Precision>(Lane(value * scale)).value;
}

// The gate g of z g(z), and z g'(z).
struct Gated {
  double gate, rest;
};

template <Gelu kind>
TPCORE_DEVICE Gated gelu_gate(double z) {
  // Beyond 64 the gate is 0 or 1; a cube that overflows would make it NaN.
  const double near = z > 64 ? 64 : z < -64 ? -64 : z;
  if constexpr (kind == Gelu::kTanh) {
    const double square = near * near;
    const double twice_u = 2 * kGeluTanhScale * fabs(near) * (1 + kGeluTanhCubic * square);
    const double slope = 2 * kGeluTanhScale * (1 + 3 * kGeluTanhCubic * square);
    const double e = exponential(-twice_u), upper = 1 / (1 + e), lower = e * upper;
    return {near < 0 ? lower : upper, near * slope * lower * upper};
  }
  const double scaled = near * (kind == Gelu::kErf ? 1.0 : kOldErfScale);
  const double density = exponential(-0.5 * scaled * scaled) * 0.3989422804014326779;
  return {0.5 * erfc(-scaled * kSqrtHalf), scaled * density};
}

template <Gelu kind, class Precision>
TPCORE_DEVICE double gelu(double z) {
  const double gate = gelu_gate<kind>(z).gate;
  return gate == 0 ? gate : z * gate;
}

template <Gelu kind, class Precision>
TPCORE_DEVICE double gelu_slope(double z) {
  const Gated gated = gelu_gate<kind>(z);
  return gated.gate + gated.rest;
}

template <Gelu kind>
struct Kind {
  static constexpr Gelu value = kind;
};

// function(Kind) for the kind of the whole grid.
template <class Function>
TPCORE_DEVICE void with_kind(Gelu kind, const Function& function) {
  if (kind == Gelu::kErf) {
    function(Kind<Gelu::kErf>{});
  } else if (kind == Gelu::kTanh) {
    function(Kind<Gelu::kTanh>{});
  } else {
    function(Kind<Gelu::kOldErf>{});
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
    with_kind(args.gelu, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = gelu<decltype(kind)::value, PrecisionOf<T>>(z[i]);
    });
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
    with_kind(args.gelu, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        grad[i] = grad_y[i] * gelu_slope<decltype(kind)::value, PrecisionOf<T>>(z[i]);
        sums[i] += grad[i];
      }
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
