// SPDX-License-Identifier: Apache-2.0
// The transpose as a raw op of the CPU; registered in cpu_ops.cpp.
#pragma once

#include "checks.h"

namespace tpcore {

Tensor transpose16(const Tensor& x);

}  // namespace tpcore
