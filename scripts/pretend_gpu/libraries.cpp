// Without a GPU, as far as PyTorch and Triton call them: the driver, cuBLAS and cuDNN.
#include "pretended.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

// ---- the driver: Triton's kernels and Inductor's
namespace {
struct Function {
    std::string name;
};
int drive(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, void* stream) {
    return launch(stream, ((Function*)function)->name, dim3{x, y, z}, threads);
}
struct LaunchConfig {  // CUlaunchConfig
    unsigned x, y, z, block_x, block_y, block_z, shared;
    void* stream;
};
char context;
}  // namespace

API int cuInit(unsigned) { return 0; }
API int cuCtxGetCurrent(void** current) { return *current = &context, 0; }
API int cuCtxSetCurrent(void*) { return 0; }
API int cuDeviceGet(int* device, int) { return *device = 0, 0; }
API int cuDeviceGetAttribute(int* value, int attribute, int) {
    return cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, 0);
}
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
API int cuDevicePrimaryCtxRetain(void** current, int) { return *current = &context, 0; }
API int cuFuncGetAttribute(int* value, int attribute, void*) { return *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0, 0; }
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuCtxSetLimit) NOTHING(cuTensorMapEncodeTiled)
// PyTorch's and Triton's libraries name these, and nothing here calls them.
NOTHING(cuCtxGetLimit) NOTHING(cuLaunchCooperativeKernel) NOTHING(cuLinkAddData_v2) NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2) NOTHING(cuModuleLoadDataEx) NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
API int cuGetErrorString(int error, const char** text) { return *text = cudaGetErrorName((Error)error), 0; }
API int cuModuleLoadData(void** module, const void* image) {
    *module = &context;
    return memcmp(image, "\x7f" "ELF", 4) ? 200 : forbidden("cuModuleLoadData");  // warm-up should have loaded every kernel
}
API int cuModuleLoad(void** module, const char*) { return *module = &context, forbidden("cuModuleLoad"); }
API int cuModuleUnload(void*) { return 0; }
API int cuModuleGetFunction(void** function, void*, const char* name) { return *function = new Function{name}, 0; }
API int cuOccupancyMaxActiveClusters(int* n, void*, void*) { return *n = 16, 0; }
API int cuPointerGetAttribute(void* value, int, unsigned long long p) {  // the one that is asked for: where a kernel finds it
    return is_on_device((void*)p) ? (*(unsigned long long*)value = p, 0) : 1;
}
API int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z,
                       unsigned, void* stream, void**, void**) {
    return drive(function, x, y, z, block_x * block_y * block_z, stream);
}
API int cuLaunchKernelEx(const LaunchConfig* how, void* function, void**, void**) {
    return drive(function, how->x, how->y, how->z, how->block_x * how->block_y * how->block_z, how->stream);
}

// ---- cuBLAS and cuDNN: descriptors are empty, every operation is one launch
namespace {
struct Handle {
    void* stream = nullptr;
};
int descriptor(void** made) { return *made = calloc(1, 512), 0; }
int operation(void* handle, const char* name) { return launch(((Handle*)handle)->stream, name) ? 8 : 0; }
}  // namespace
#define DESCRIPTOR(name) \
    API int name(void** made) { return descriptor(made); }
#define OPERATION(name) \
    API int name(void* handle) { return operation(handle, #name); }

API int cublasCreate_v2(void** handle) { return *handle = new Handle, 0; }
API int cublasSetStream_v2(void* handle, void* stream) { return ((Handle*)handle)->stream = stream, 0; }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
NOTHING(cublasDestroy_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode) NOTHING(cublasSetPointerMode_v2)
OPERATION(cublasSgemm_v2) OPERATION(cublasSgemmEx) OPERATION(cublasGemmEx) OPERATION(cublasGemmStridedBatchedEx)
OPERATION(cublasSgemmStridedBatched) OPERATION(cublasSgemv_v2) OPERATION(cublasSdot_v2) OPERATION(cublasDotEx)
OPERATION(cublasDgemm_v2) OPERATION(cublasDgemmStridedBatched) OPERATION(cublasDgemv_v2) OPERATION(cublasDdot_v2)
DESCRIPTOR(cublasLtMatmulDescCreate) DESCRIPTOR(cublasLtMatmulPreferenceCreate) DESCRIPTOR(cublasLtMatrixLayoutCreate)
NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute) NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute)
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found, int* n) {
    return memset(found, 0, 96), *n = 1, 0;
}
API int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, size_t,
                       void* stream) {
    return launch(stream, "cublasLtMatmul") ? 14 : 0;
}

API int cudnnCreate(void** handle) { return *handle = new Handle, 0; }
API int cudnnSetStream(void* handle, void* stream) { return ((Handle*)handle)->stream = stream, 0; }
API int cudnnGetStream(void* handle, void** stream) { return *stream = ((Handle*)handle)->stream, 0; }
API int cudnnBackendCreateDescriptor(int, void** made) { return descriptor(made); }
NOTHING(cudnnBackendDestroyDescriptor) NOTHING(cudnnBackendFinalize) NOTHING(cudnnBackendSetAttribute)
API int cudnnBackendGetAttribute(void*, int attribute, int type, int64_t room, int64_t* n, void* found) {
    // One engine, without knobs (302, 1302), notes (1303, 1305) or a workspace.
    constexpr int INT64 = 3, DESCRIPTOR_TYPE = 15;
    bool has = attribute != 302 && attribute != 1302 && attribute != 1303 && attribute != 1305;
    if (n) *n = has;
    if (found && room > 0 && has && type != DESCRIPTOR_TYPE) memset(found, 0, type == INT64 ? 8 : 4);
    return 0;
}
OPERATION(cudnnBackendExecute)
DESCRIPTOR(cudnnCreateTensorDescriptor) DESCRIPTOR(cudnnCreateActivationDescriptor)
NOTHING(cudnnDestroyTensorDescriptor) NOTHING(cudnnDestroyActivationDescriptor) NOTHING(cudnnSetTensorNdDescriptor)
NOTHING(cudnnSetActivationDescriptor) NOTHING(cudnnGetTensorNdDescriptor)
OPERATION(cudnnBatchNormalizationForwardTrainingEx) OPERATION(cudnnBatchNormalizationForwardInference)
OPERATION(cudnnBatchNormalizationBackwardEx)
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, size_t* n) {
    return *n = 16, 0;
}
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*,
                                                          size_t* n) {
    return *n = 16, 0;
}
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* n) { return *n = 16, 0; }
