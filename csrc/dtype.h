// The dtypes of tensors, numbered as in lipfast/ops.
#pragma once

namespace lipfast {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace lipfast
