// The largest errors of the elementary functions of csrc/cpu, over every stride-th bit pattern of
// float32: one line of `name error argument` for each. Errors are in units in the last place where
// the result is a normal number; those of the slopes are absolute. Compiled for one instruction set
// by tests/kernels/test_vector_math.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "vector_math.h"

using namespace tpcore::TPCORE_ISA;
using tpcore::Gelu;
using tpcore::Single;
using V = Vec<float>;
using Exact = long double;

static double in_units(Exact error, Exact exact) {
  int exponent;
  std::frexp(exact, &exponent);
  return static_cast<double>(std::ldexp(error, 24 - exponent));
}

template <class Function>
static void measure(const char* name, bool relative, uint32_t stride, const Function& function,
                    Exact (*exact)(Exact)) {
  double worst = 0;
  float worst_at = 0;
  for (uint32_t sign : {0u, 0x80000000u}) {
    for (uint32_t first = 0; first < 0x7f800000u; first += stride * V::size) {
      float x[V::size], y[V::size];
      for (uint32_t i = 0; i < V::size; ++i) {
        const uint32_t bits = first + i * stride;
        x[i] = tpcore::float_from_bits((bits < 0x7f800000u ? bits : 0x7f7fffffu) | sign);
      }
      function(V::load(x, Full{})).store(y, Full{});
      for (int64_t i = 0; i < V::size; ++i) {
        const Exact expected = exact(x[i]);
        const Exact error = std::fabs(y[i] - expected);
        double measured = static_cast<double>(error);
        if (relative) {
          // Below the normal numbers anything down to 0; above the largest, infinity.
          if (std::fabs(expected) > 0x1.fffffep127L) {
            measured = std::isinf(y[i]) ? 0 : HUGE_VAL;
          } else if (std::fabs(expected) < 0x1p-126L) {
            measured = error <= 0x1p-126L ? 0 : HUGE_VAL;
          } else {
            measured = in_units(error, expected);
          }
        }
        if (measured <= worst) continue;
        worst = measured;
        worst_at = x[i];
      }
    }
  }
  std::printf("%s %.4g %.9g\n", name, worst, static_cast<double>(worst_at));
}

static Exact cdf(Exact z) { return std::erfc(-z * 0.707106781186547524400844362104849L) / 2; }
static Exact density(Exact z) {
  return std::exp(-z * z / 2) * 0.398942280401432677939946059934382L;
}
constexpr Exact kOldScale = 1.41421356237309504880168872420969808L / 1.41421L;
constexpr Exact kRoot = 0.797884560802865355879892119868763737L;
static Exact tanh_gate(Exact z) {
  return 1 / (1 + std::exp(-2 * kRoot * z * (1 + 0.044715L * z * z)));
}

template <Gelu kind>
static void measure_gelu(const char* name, const char* slope_name, uint32_t stride,
                         Exact (*exact)(Exact), Exact (*exact_slope)(Exact)) {
  measure(name, true, stride, [](V z) { return gelu<kind, Single>(z); }, exact);
  measure(slope_name, false, stride, [](V z) { return gelu_slope<kind, Single>(z); }, exact_slope);
}

int main(int, char** arguments) {
  const uint32_t stride = static_cast<uint32_t>(std::atoi(arguments[1]));
  measure("exponential", true, stride, [](V x) { return exponential(x); }, std::exp);
  measure_gelu<Gelu::kErf>(
      "gelu", "gelu_slope", stride, [](Exact z) { return z * cdf(z); },
      [](Exact z) { return std::fabs(z) > 200 ? Exact(z > 0) : cdf(z) + z * density(z); });
  measure_gelu<Gelu::kOldErf>(
      "old_gelu", "old_gelu_slope", stride, [](Exact z) { return z * cdf(kOldScale * z); },
      [](Exact z) {
        if (std::fabs(z) > 200) return Exact(z > 0);
        return cdf(kOldScale * z) + kOldScale * z * density(kOldScale * z);
      });
  measure_gelu<Gelu::kTanh>(
      "tanh_gelu", "tanh_gelu_slope", stride,
      [](Exact z) { return std::fabs(z) > 200 ? (z > 0 ? z : 0) : z * tanh_gate(z); },
      [](Exact z) {
        if (std::fabs(z) > 20) return Exact(z > 0);
        const Exact gate = tanh_gate(z);
        return gate + z * 2 * kRoot * (1 + 0.134145L * z * z) * gate * (1 - gate);
      });
  return 0;
}
