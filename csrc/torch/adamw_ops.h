// SPDX-License-Identifier: Apache-2.0
// A step of AdamW as a raw op of the CPU; registered in cpu_ops.cpp.
#pragma once

#include "checks.h"

namespace tpcore {

void adamw_(const Tensor& weight, const Tensor& grad, const Tensor& exp_avg,
            const Tensor& exp_avg_sq, const OptionalTensor& copy, double lr, double beta1,
            double beta2, double eps, double weight_decay, double step, double grad_factor);

}  // namespace tpcore
