// SPDX-License-Identifier: Apache-2.0
// A CUDA device for a torch that was built without CUDA: tensors that are on "cuda:0" in every way
// that code can see, with their data in host memory. Every op of torch runs its CPU kernel on
// copies; an op of tensors on different devices is refused as on a GPU. Our own ops come from the
// same bindings and kernels as on a GPU, the kernels emulated (tests/cuda_emulation).
//
// To be preloaded: torch looks for CUDA once, while it is imported.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

const Device kDevice(DeviceType::CUDA, 0);

// --- The device ---

struct HostMemory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes != 0) {
      TORCH_CHECK(posix_memalign(&data, 512, bytes) == 0, "out of memory: ", bytes, " bytes");
    }
    return {data, data, &std::free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};
HostMemory memory;
REGISTER_ALLOCATOR(DeviceType::CUDA, &memory)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    check(device);
    return kDevice;
  }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device device) const override { check(device); }
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  static void check(Device device) {
    TORCH_CHECK(device.is_cuda() && device.index() <= 0, "there is no device ", device);
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Of a device that draws what the CPU draws: `host` is the generator that the CPU's kernels get.
struct GeneratorOnTheDevice final : c10::GeneratorImpl {
  GeneratorOnTheDevice()
      : GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        host(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorOnTheDevice* clone_impl() const override {
    auto* copy = new GeneratorOnTheDevice();
    copy->host = host.clone();
    return copy;
  }
  mutable at::Generator host;
};

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  void deviceSynchronize(DeviceIndex) const override {}
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<GeneratorOnTheDevice>();
  }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace

// In place of torch's own, which decides when it is compiled.
namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<DeviceType> getAccelerator(bool) {
  return DeviceType::CUDA;
}
}  // namespace at::accelerator

namespace {

// --- Its ops ---

Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype,
             std::optional<c10::Layout>, std::optional<Device>, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

// The same memory, as a CPU tensor.
Tensor on_the_host(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       tensor.options().device(c10::kCPU));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  on_the_host(self).copy_(on_the_host(source));
  return self;
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size,
                      std::optional<c10::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  const size_t bytes = (self.storage_offset() + self.numel()) * self.itemsize();
  const c10::Storage& storage = self.storage();
  if (bytes > storage.nbytes()) {
    c10::DataPtr larger = memory.allocate(bytes);
    memory.copy_data(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  return self;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (source.sizes() != target.sizes()) target.resize_(source.sizes());
  Tensor result = target;
  return result.copy_(source);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}
Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset.has_value() ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}
Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor& set_storage(Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}
Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  const int64_t elements = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {elements}, {1});
}
c10::Scalar local_scalar_dense(const Tensor& self) { return on_the_host(self).item(); }
bool is_pinned(const Tensor&, std::optional<Device>) { return false; }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("resize_", resize_);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("is_pinned", is_pinned);
}

// As on a GPU: tensors of an op share a device, but for scalars and indices on the CPU.
void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const std::string& name = op.schema().name();
  const bool indexes = name == "aten::index" || name == "aten::_unsafe_index" ||
                       name == "aten::index_put" || name == "aten::index_put_" ||
                       name == "aten::_index_put_impl_";
  const auto check = [&](const Tensor& tensor, const char* argument) {
    if (!tensor.defined() || tensor.is_cuda() || tensor.dim() == 0) return;
    if (indexes && (tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kBool)) return;
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but the argument ", argument,
                " of ", name, " is on ", tensor.device(), ", and another is on ", kDevice);
  };
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = stack[stack.size() - arguments.size() + i];
    if (value.isTensor()) check(value.toTensor(), arguments[i].name().c_str());
    if (!value.isTensorList()) continue;
    for (const Tensor& tensor : value.toTensorVector()) check(tensor, arguments[i].name().c_str());
  }
}

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  TORCH_CHECK(name.rfind("aten::", 0) == 0, name, " has no CUDA kernel");
  check_devices(op, *stack);
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    if (!(*stack)[i].isGenerator()) continue;
    at::Generator generator = (*stack)[i].toGenerator();
    TORCH_CHECK(generator.device().is_cuda(),
                "Expected a 'cuda' device type for generator but found '",
                generator.device().type(), "'");
    (*stack)[i] = generator.get<GeneratorOnTheDevice>()->host;
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

}  // namespace

// What the bindings ask of torch's CUDA library.
extern "C" __attribute__((visibility("default"))) int32_t
aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = nullptr;
  return device != 0;
}
