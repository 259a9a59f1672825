// SPDX-License-Identifier: Apache-2.0
// A step of AdamW: check and launch. The schema stands in tpcore/_native.py.
#include "adamw_ops.h"

#include "launch.h"

namespace tpcore {
namespace {

// A contiguous tensor of the shape of `model`.
void check_like(const Tensor& tensor, const char* name, const Tensor& model) {
  bool same = tensor.dim() == model.dim();
  for (int64_t i = 0; same && i < model.dim(); ++i) same = tensor.size(i) == model.size(i);
  STD_TORCH_CHECK(same, name, " has shape ", shape_string(tensor), "; expected that of weight, ",
                  shape_string(model));
  STD_TORCH_CHECK(is_here(tensor), name, " is not ", kHere);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

void* state_of(const Tensor& tensor, const char* name, const Tensor& model) {
  check_like(tensor, name, model);
  STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type(), name,
                  " differs from weight in dtype");
  return tensor.mutable_data_ptr();
}

}  // namespace

void adamw_(const Tensor& weight, const Tensor& grad, const Tensor& exp_avg,
            const Tensor& exp_avg_sq, const OptionalTensor& copy, double lr, double beta1,
            double beta2, double eps, double weight_decay, double step, double grad_factor) {
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "weight has an unsupported dtype; expected float32 or float64");
  STD_TORCH_CHECK(step >= 1, "step is ", step, "; expected 1 or more");
  check_like(grad, "grad", weight);
  AdamW args;
  args.count = weight.numel();
  args.grad_dtype = dtype_of(grad, "grad");
  args.dtype = args.grad_dtype;
  args.copy = nullptr;
  if (copy.has_value()) {
    check_like(*copy, "copy", weight);
    args.dtype = dtype_of(*copy, "copy");
    args.copy = copy->mutable_data_ptr();
  }
  STD_TORCH_CHECK(args.grad_dtype == args.dtype || grad.scalar_type() == ScalarType::Float,
                  "grad and copy differ in dtype; expected grad in that of copy, or float32");
  STD_TORCH_CHECK((args.dtype == DType::kFloat64) == (type == ScalarType::Double),
                  "grad and copy are float64 if weight is, and only then");
  args.lr = lr;
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.eps = eps;
  args.weight_decay = weight_decay;
  args.step = step;
  args.grad_factor = grad_factor;
  args.grad = grad.const_data_ptr();
  args.weight = state_of(weight, "weight", weight);
  args.exp_avg = state_of(exp_avg, "exp_avg", weight);
  args.exp_avg_sq = state_of(exp_avg_sq, "exp_avg_sq", weight);
  kernels().adamw(args, parallel_for);
}

}  // namespace tpcore
