// SPDX-License-Identifier: Apache-2.0
// A step of AdamW: the formula in tpcore/kernels.h.
//
// All that a parameter has is read and written once: the gradient as the product left it, and the
// rounded weight that the next forward reads beside the weight itself.
#include "parallel.h"
#include "types.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

// The constants of a step, rounded as torch rounds them: each from float64, once.
template <class V, class A>
struct Step {
  V factor, decay, lerp, beta2, square, rate, correction, eps;
  bool decays, from_moment;

  explicit Step(const AdamW& args) {
    const auto constant = [](double value) { return V(static_cast<A>(value)); };
    const double lerp_weight = 1 - args.beta1;
    factor = constant(args.grad_factor);
    decays = args.weight_decay != 0;
    decay = constant(1 - args.lr * args.weight_decay);
    // m + (1 - beta1) (g - m), or what is the same, from the nearer end: g - beta1 (g - m).
    from_moment = static_cast<A>(lerp_weight) < A(0.5);
    lerp = from_moment ? constant(lerp_weight) : constant(lerp_weight) - V(A(1));
    beta2 = constant(args.beta2);
    square = constant(1 - args.beta2);
    rate = constant(-(args.lr / (1 - __builtin_pow(args.beta1, args.step))));
    correction = constant(__builtin_sqrt(1 - __builtin_pow(args.beta2, args.step)));
    eps = constant(args.eps);
  }
};

// beta2 v + (1 - beta2) g^2, from (1 - beta2) g. torch's compiler fuses the second product, and
// behind the last whole vector, which has 32 bytes even where the machine has larger ones, the
// first.
template <class V>
TPCORE_INLINE V next_square(V v, V beta2, V weighted, V g, Full) {
  return multiply_add(weighted, g, v * beta2);
}
template <class A>
TPCORE_INLINE Vec<A> next_square(Vec<A> v, Vec<A> beta2, Vec<A> weighted, Vec<A> g, Partial lanes) {
  const Vec<A> rest = multiply_add(v, beta2, weighted * g);
  constexpr int64_t kWhole = 32 / static_cast<int64_t>(sizeof(A));
  if (lanes.count < kWhole) return rest;
  const Partial whole{lanes.count - lanes.count % kWhole};
  return select(Vec<A>::first(whole), next_square(v, beta2, weighted, g, Full{}), rest);
}

}  // namespace

void adamw(const AdamW& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.grad_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    using A = Acc<T>;
    using V = Vec<A>;
    const Step<V, A> step(args);
    // Pieces of whole vectors of any instruction set, so that the end of the tensor alone is
    // partial.
    constexpr int64_t kUnit = 16;
    const int64_t units = (args.count + kUnit - 1) / kUnit;
    const int64_t bytes = kUnit * static_cast<int64_t>(6 * sizeof(A) + sizeof(P) + sizeof(T));
    parallel_rows(parallel_for, units, bytes, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kUnit;
      const int64_t end = last * kUnit < args.count ? last * kUnit : args.count;
      const P* grad = static_cast<const P*>(args.grad) + begin;
      A* weight = static_cast<A*>(args.weight) + begin;
      A* exp_avg = static_cast<A*>(args.exp_avg) + begin;
      A* exp_avg_sq = static_cast<A*>(args.exp_avg_sq) + begin;
      T* copy = args.copy != nullptr ? static_cast<T*>(args.copy) + begin : nullptr;
      for_each_vector<V>(end - begin, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
        prefetch(grad + i);
        prefetch_to_write(weight + i);
        prefetch_to_write(exp_avg + i);
        prefetch_to_write(exp_avg_sq + i);
        if (copy != nullptr) prefetch_to_write(copy + i);
        const V g = V::load(grad + i, lanes) * step.factor;
        const V m = V::load(exp_avg + i, lanes);
        const V v = V::load(exp_avg_sq + i, lanes);
        V w = V::load(weight + i, lanes);
        if (step.decays) w = w * step.decay;
        const V next_m = multiply_add(step.lerp, g - m, step.from_moment ? m : g);
        const V next_v = next_square(v, step.beta2, step.square * g, g, lanes);
        next_m.store(exp_avg + i, lanes);
        next_v.store(exp_avg_sq + i, lanes);
        const V root = square_root(next_v) / step.correction + step.eps;
        w = w + step.rate * next_m / root;
        w.store(weight + i, lanes);
        if (copy != nullptr) w.store(copy + i, lanes);
      });
    });
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
