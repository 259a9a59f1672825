// Runs the kernels of csrc/cpu against plain loops in float64: for a machine that tests written in
// Python do not reach, such as an emulated one. Says what failed; the exit status counts it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "tpcore/kernels.h"
#include "tpcore/math.h"

using namespace tpcore;
using Floats = std::vector<float>;

static int failures = 0;
static void check(bool right, const char* what) {
  if (!right) std::printf("%s is wrong\n", what);
  failures += !right;
}
static bool close(double a, double b, double tolerance = 2e-6) {
  return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

// In two pieces, last one first.
static void in_pieces(int64_t count, int64_t grain, const void* closure, ParallelBody body) {
  const int64_t middle = count > grain ? count / 2 : 0;
  body(closure, middle, count);
  if (middle > 0) body(closure, 0, middle);
}

static Floats draw(int64_t count, float scale = 1) {
  static uint32_t state = 12345;
  Floats values(static_cast<size_t>(count));
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = scale * (static_cast<float>(state >> 8) / 8388608.0f - 1.0f);
  }
  return values;
}

static const int64_t kRows = 37, kColumns = 83;
static int64_t row_ids[kRows];

static DropoutKey dropout_key() {
  for (int64_t i = 0; i < kRows; ++i) row_ids[i] = i * 0x100003001 - 7;
  DropoutKey key;
  key.seed = 0x123456789abcdefull;
  key.threshold = 1288490189;  // p = 0.3
  key.stream = 9;
  key.row_ids = row_ids;
  return key;
}
static bool kept(const DropoutKey& key, int64_t row, int64_t head, int64_t column) {
  column += key.column_offset;
  const uint64_t id = static_cast<uint64_t>(key.row_ids[row]);
  uint32_t counter[4] = {static_cast<uint32_t>(column / 4), static_cast<uint32_t>(id),
                         static_cast<uint32_t>(id >> 32),
                         static_cast<uint32_t>(key.head_offset + head) << 16 | key.stream};
  philox4x32(counter, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
  return counter[column % 4] >= key.threshold;
}

static void check_dropout(const CpuKernels& kernels) {
  DropoutKey key = dropout_key();
  for (key.column_offset = 0; key.column_offset < 4; ++key.column_offset) {
    const int64_t heads = 2;
    std::vector<uint8_t> mask(heads * kRows * kColumns);
    kernels.dropout_mask({1, heads, kRows, kColumns, key, reinterpret_cast<bool*>(mask.data())},
                         in_pieces);
    bool right = true;
    for (int64_t i = 0; i < heads * kRows * kColumns; ++i) {
      right &= mask[i] == kept(key, i / kColumns % kRows, i / kColumns / kRows, i % kColumns);
    }
    check(right, "dropout_mask");

    const Floats x = draw(kRows * kColumns), bias = draw(kColumns),
                 residual = draw(kRows * kColumns);
    Floats y(x.size()), grad_x(x.size()), grad_bias(kColumns),
        partials(partial_sums(kRows) * kColumns);
    std::vector<uint8_t> bits(kRows * ((kColumns + 7) / 8));
    BiasDropoutResidualForward forward{
        kRows, kColumns, DType::kFloat32, DType::kFloat32, {},         bias.data(),
        {},    &key,     1.0 / 0.7,       y.data(),        bits.data()};
    forward.x = {const_cast<float*>(x.data()), kColumns};
    forward.residual = {const_cast<float*>(residual.data()), kColumns};
    kernels.bias_dropout_residual_forward(forward, in_pieces);
    BiasDropoutResidualBackward backward{
        kRows,         kColumns,         DType::kFloat32, {}, nullptr, bits.data(), 1.0 / 0.7,
        grad_x.data(), grad_bias.data(), partials.data()};
    backward.grad_y = forward.x;
    kernels.bias_dropout_residual_backward(backward, in_pieces);
    std::vector<double> sums(kColumns);
    for (int64_t i = 0; i < kRows * kColumns; ++i) {
      const int64_t c = i % kColumns;
      const double scale = kept(key, i / kColumns, 0, c) ? 1 / 0.7 : 0;
      right &=
          close(y[i], scale * (x[i] + bias[c]) + residual[i]) && close(grad_x[i], scale * x[i]);
      sums[c] += scale * x[i];
    }
    for (int64_t c = 0; c < kColumns; ++c) right &= close(grad_bias[c], sums[c], 1e-5);
    check(right, "bias_dropout_residual");
  }
}

// Every bit pattern of a half precision passes through float32 and back.
static void check_conversions(const CpuKernels& kernels, DType dtype, uint32_t infinity) {
  std::vector<uint16_t> x(65536), y(65536);
  for (uint32_t i = 0; i < 65536; ++i) x[i] = static_cast<uint16_t>(i);
  BiasDropoutResidualForward args{256, 256,     dtype, dtype,    {},     nullptr,
                                  {},  nullptr, 1,     y.data(), nullptr};
  args.x = {x.data(), 256};
  kernels.bias_dropout_residual_forward(args, in_pieces);
  bool right = true;
  for (uint32_t i = 0; i < 65536; ++i) {
    const bool nan = (i & 0x7fff) > infinity;
    right &= nan ? (y[i] & 0x7fff) > infinity : y[i] == x[i];
  }
  check(right, "a conversion to half precision and back");
}

static void check_layer_norm(const CpuKernels& kernels) {
  const Floats x = draw(kRows * kColumns, 3), weight = draw(kColumns), bias = draw(kColumns),
               grad_y = draw(kRows * kColumns);
  Floats y(x.size()), mean(kRows), rstd(kRows), grad_x(x.size()), grad_weight(kColumns),
      grad_bias(kColumns), partials(2 * partial_sums(kRows) * kColumns);
  const Matrix rows{const_cast<float*>(x.data()), kColumns};
  const Matrix grads{const_cast<float*>(grad_y.data()), kColumns};
  kernels.layer_norm_forward({kRows,
                              kColumns,
                              1e-5,
                              DType::kFloat32,
                              DType::kFloat32,
                              rows,
                              {},
                              weight.data(),
                              bias.data(),
                              nullptr,
                              y.data(),
                              mean.data(),
                              rstd.data()},
                             in_pieces);
  kernels.layer_norm_backward({kRows,
                               kColumns,
                               DType::kFloat32,
                               DType::kFloat32,
                               grads,
                               rows,
                               {},
                               mean.data(),
                               rstd.data(),
                               weight.data(),
                               grad_x.data(),
                               grad_weight.data(),
                               grad_bias.data(),
                               partials.data()},
                              in_pieces);
  bool right = true;
  for (int64_t r = 0; r < kRows; ++r) {
    const float* row = x.data() + r * kColumns;
    double m = 0, v = 0, mean_g = 0, mean_g_xhat = 0;
    for (int64_t c = 0; c < kColumns; ++c) m += row[c] / double(kColumns);
    for (int64_t c = 0; c < kColumns; ++c) v += (row[c] - m) * (row[c] - m) / double(kColumns);
    const double s = 1 / std::sqrt(v + 1e-5);
    for (int64_t c = 0; c < kColumns; ++c) {
      const double g = double(grad_y[r * kColumns + c]) * weight[c] / double(kColumns);
      mean_g += g;
      mean_g_xhat += g * (row[c] - m) * s;
    }
    for (int64_t c = 0; c < kColumns; ++c) {
      const int64_t i = r * kColumns + c;
      const double xhat = (row[c] - m) * s, g = double(grad_y[i]) * weight[c];
      right &= close(y[i], xhat * weight[c] + bias[c]) &&
               close(grad_x[i], s * (g - mean_g - xhat * mean_g_xhat));
    }
  }
  check(right, "layer_norm");
}

static void check_gelu(const CpuKernels& kernels) {
  const Floats x = draw(kRows * kColumns, 6);
  const Matrix rows{const_cast<float*>(x.data()), kColumns};
  Floats y(x.size()), grad(x.size());
  const Floats ones(x.size(), 1.0f);
  const Matrix grads{const_cast<float*>(ones.data()), kColumns};
  for (Gelu kind : {Gelu::kErf, Gelu::kTanh, Gelu::kOldErf}) {
    const DType type = DType::kFloat32;
    kernels.bias_gelu_forward({kRows, kColumns, type, type, kind, rows, nullptr, y.data()},
                              in_pieces);
    kernels.bias_gelu_backward(
        {kRows, kColumns, type, type, kind, grads, rows, nullptr, grad.data(), nullptr, nullptr},
        in_pieces);
    const auto gelu = [&](double z) {
      if (kind == Gelu::kErf) return z / 2 * std::erfc(-z * kSqrtHalf);
      if (kind == Gelu::kOldErf) return z / 2 * std::erfc(-z / 1.41421);
      return z / (1 + std::exp(-2 * kGeluTanhScale * (z + kGeluTanhCubic * z * z * z)));
    };
    bool right = true;
    for (size_t i = 0; i < x.size(); ++i) {
      const double slope = (gelu(x[i] + 1e-5) - gelu(x[i] - 1e-5)) / 2e-5;
      right &= close(y[i], gelu(x[i])) && close(grad[i], slope);
    }
    check(right, "bias_gelu");
  }
}

// Attention of one sequence by masked_softmax's formula: both kernels, one truth.
static void check_attention(const CpuKernels& kernels) {
  const int64_t t = kRows, d = 20;
  DropoutKey key = dropout_key();
  const Floats qkv = draw(t * 3 * d);
  const int32_t cu_seqlens[2] = {0, static_cast<int32_t>(t)};
  Floats context(t * d), max(t), sum_exp(t), scores(t * t), probs(t * t), y(t * t);
  kernels.packed_attention_forward({{t,
                                     1,
                                     d,
                                     1,
                                     t,
                                     DType::kFloat32,
                                     {const_cast<float*>(qkv.data()), 3 * d},
                                     cu_seqlens,
                                     0.5,
                                     true,
                                     &key,
                                     1 / 0.7},
                                    context.data(),
                                    max.data(),
                                    sum_exp.data()},
                                   in_pieces);
  for (int64_t i = 0; i < t * t; ++i) {
    for (int64_t k = 0; k < d; ++k) {
      scores[i] += qkv[i / t * 3 * d + k] * qkv[i % t * 3 * d + d + k];
    }
  }
  MaskedSoftmaxForward args{
      1,  1,   t,    t,    DType::kFloat32, scores.data(), {t * t, t * t, t}, nullptr,
      {}, 0.5, true, &key, 1 / 0.7,         y.data(),      probs.data()};
  kernels.masked_softmax_forward(args, in_pieces);
  bool right_softmax = true, right_attention = true;
  for (int64_t q = 0; q < t; ++q) {
    double sum = 0;
    std::vector<double> out(d);
    for (int64_t k = 0; k <= q; ++k) sum += std::exp(0.5 * scores[q * t + k]);
    for (int64_t k = 0; k < t; ++k) {
      const double p = k <= q ? std::exp(0.5 * scores[q * t + k]) / sum : 0;
      const bool keep = kept(key, q, 0, k);
      right_softmax &= close(y[q * t + k], keep ? p / 0.7 : 0);
      right_softmax &= close(std::fabs(probs[q * t + k]), p);
      right_softmax &= k > q || std::signbit(probs[q * t + k]) == !keep;
      for (int64_t c = 0; c < d && keep; ++c) out[c] += p / 0.7 * qkv[k * 3 * d + 2 * d + c];
    }
    for (int64_t c = 0; c < d; ++c) right_attention &= close(context[q * d + c], out[c], 1e-5);
  }
  check(right_softmax, "masked_softmax");
  check(right_attention, "packed_attention");
}

int main() {
  const CpuKernels* kernels = cpu_kernels();
  if (kernels == nullptr) {
    std::printf("%s\n", cpu_kernels_error());
    return 1;
  }
  check_dropout(*kernels);
  check_conversions(*kernels, DType::kBFloat16, 0x7f80);
  check_conversions(*kernels, DType::kFloat16, 0x7c00);
  check_layer_norm(*kernels);
  check_gelu(*kernels);
  check_attention(*kernels);
  std::printf("%s: %d failures\n", kernels->isa, failures);
  return failures;
}
