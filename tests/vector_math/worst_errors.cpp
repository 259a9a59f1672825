// The largest errors of the vector functions of csrc/cpu, in units in the last place of float32,
// over every stride-th bit pattern of float32: one line of `name error argument` for each. Compiled
// for one instruction set by tests/kernels/test_vector_math.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "vector_math.h"

using namespace tpcore::TPCORE_ISA;
using V = Vec<float>;

static double unit_in_the_last_place(double exact) {
  int exponent;
  std::frexp(exact, &exponent);
  return std::ldexp(1.0, (exponent < -125 ? -125 : exponent) - 24);
}

template <class Function>
static void measure(const char* name, uint32_t stride, float lowest, float highest,
                    const Function& function, double (*exact)(double)) {
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
        if (!(lowest <= x[i] && x[i] <= highest)) continue;
        const double expected = exact(x[i]);
        const double error = std::fabs(y[i] - expected) / unit_in_the_last_place(expected);
        if (error <= worst) continue;
        worst = error;
        worst_at = x[i];
      }
    }
  }
  std::printf("%s %.4f %.9g\n", name, worst, static_cast<double>(worst_at));
}

int main(int, char** arguments) {
  const uint32_t stride = static_cast<uint32_t>(std::atoi(arguments[1]));
  measure("exponential", stride, -104.0f, 88.72f, [](V x) { return exponential(x); }, std::exp);
  measure(
      "normal_cdf", stride, -12.0f, 12.0f, [](V z) { return normal_cdf<Single>(z); },
      [](double z) { return 0.5 * std::erfc(-z * std::sqrt(0.5)); });
  measure(
      "logistic", stride, -87.0f, 100.0f, [](V x) { return logistic(x); },
      [](double x) { return 1 / (1 + std::exp(-x)); });
  return 0;
}
