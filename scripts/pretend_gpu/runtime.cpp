// CUDA's runtime without a GPU, as far as PyTorch calls it. Device memory is the host's, kernels do nothing, copies copy. Streams, events and captures obey CUDA's rules: what would break a capture off
// there, a wait or a dependency on the default stream, breaks it off here, with the same error.
//
// With `libraries.cpp` preloaded, and found as libcuda.so.1. For CUDA 13; what is in neither is the real libraries', and fails.
#include "pretended.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {
std::recursive_mutex mutex_;
#define LOCK std::lock_guard<std::recursive_mutex> guard(mutex_)

struct Graph {
    std::vector<std::string> nodes;
};
struct Stream;
struct Capture {
    unsigned long long id;
    cudaStreamCaptureMode mode;
    Stream* origin;
    pthread_t owner;
    bool valid = true;
    Graph* graph = new Graph;
    std::set<Stream*> streams;
};
struct Stream {
    unsigned flags;
    int priority;
    Capture* capture = nullptr;
    bool joined = true;
};
struct Event {
    bool timing;
    bool recorded = false;
    double at = 0;
    Capture* capture = nullptr;
    Stream* from = nullptr;
};

std::set<Capture*> captures;
unsigned long long ids = 1;
std::map<std::string, long> counts;  // calls by name; launches as "launch"
std::string last_graph;
thread_local Error last = cudaSuccess;
thread_local cudaStreamCaptureMode own_mode = cudaStreamCaptureModeGlobal;

Stream* of(void* stream) { return (uintptr_t)stream < 16 ? nullptr : (Stream*)stream; }  // nullptr: the default stream
Capture* capturing(void* stream) { return of(stream) ? of(stream)->capture : nullptr; }
Error result(Error error) {
    if (error) last = error;
    return error;
}
Error breaks(Capture* capture, Error error) {
    capture->valid = false;
    return result(error);
}
void count(const char* what) {
    LOCK;
    counts[what]++;
}
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The default stream waits for all blocking streams, so it cannot be used while one of them is captured.
Error default_stream() {
    for (Capture* capture : captures)
        if (!(capture->origin->flags & cudaStreamNonBlocking)) return breaks(capture, cudaErrorStreamCaptureImplicit);
    return cudaSuccess;
}

}  // namespace

Error forbidden(const char* what) {
    LOCK;
    count(what);
    for (Capture* capture : captures) {
        bool mine = pthread_equal(capture->owner, pthread_self());
        bool all = own_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
        if (capture->mode != cudaStreamCaptureModeRelaxed && own_mode != cudaStreamCaptureModeRelaxed && (all || mine))
            return breaks(capture, cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}

Error launch(void* stream, const std::string& name, const Work& work) {
    LOCK;
    if (Capture* capture = capturing(stream)) {
        if (!capture->valid) return result(cudaErrorStreamCaptureInvalidated);
        capture->graph->nodes.push_back(name);
        return cudaSuccess;
    }
    if (!of(stream))
        if (Error error = default_stream()) return error;
    count("launch");
    if (work) work();
    return cudaSuccess;
}
Error launch(void* stream, const std::string& name, dim3 grid, unsigned threads) {
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024) {
        fprintf(stderr, "pretended GPU: %s cannot be launched: grid %u %u %u, %u threads\n", name.c_str(), grid.x, grid.y,
                grid.z, threads);
        return result(cudaErrorInvalidConfiguration);
    }
    return launch(stream, name);
}

namespace {
// ---- an H100
constexpr int SMS = 132, SHARED = 49152, SHARED_OPTIN = 232448, SHARED_SM = 233472;
constexpr size_t L2 = 50 << 20, MEMORY = 80ull << 30;
}  // namespace

API Error cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "pretended NVIDIA H100");
    p->major = 9, p->multiProcessorCount = SMS, p->warpSize = 32, p->totalGlobalMem = MEMORY, p->l2CacheSize = L2;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = SHARED, p->sharedMemPerBlockOptin = SHARED_OPTIN, p->sharedMemPerMultiprocessor = SHARED_SM;
    p->totalConstMem = 65536, p->textureAlignment = 512, p->memoryBusWidth = 5120;
    p->unifiedAddressing = p->managedMemory = p->concurrentKernels = p->cooperativeLaunch = p->canMapHostMemory = 1;
    return cudaSuccess;
}
API Error cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    static const std::map<int, int> values = {
        {cudaDevAttrMaxThreadsPerBlock, 1024}, {cudaDevAttrMaxBlockDimX, 1024}, {cudaDevAttrMaxBlockDimY, 1024},
        {cudaDevAttrMaxBlockDimZ, 64}, {cudaDevAttrMaxGridDimX, 2147483647}, {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535}, {cudaDevAttrMaxSharedMemoryPerBlock, SHARED}, {cudaDevAttrWarpSize, 32},
        {cudaDevAttrTotalConstantMemory, 65536}, {cudaDevAttrMaxRegistersPerBlock, 65536}, {cudaDevAttrClockRate, 1980000},
        {cudaDevAttrMultiProcessorCount, SMS}, {cudaDevAttrMemoryClockRate, 2619000},
        {cudaDevAttrGlobalMemoryBusWidth, 5120}, {cudaDevAttrL2CacheSize, (int)L2},
        {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrComputeCapabilityMajor, 9},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, SHARED_SM}, {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED_OPTIN}, {cudaDevAttrCooperativeLaunch, 1}};
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return cudaSuccess;
}
API Error cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
API Error cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
API Error cudaSetDevice(int device) { return result(device ? cudaErrorInvalidDevice : cudaSuccess); }
API Error cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API Error cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API Error cudaDeviceGetPCIBusId(char* id, int size, int) { return snprintf(id, size, "0000:00:00.0"), cudaSuccess; }
API Error cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, cudaSuccess; }
API Error cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API Error cudaDeviceSynchronize() { return forbidden("cudaDeviceSynchronize"); }
API Error cudaGetLastError() {
    Error error = last;
    return last = cudaSuccess, error;
}
API Error cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorName(Error error) {
    static const std::map<int, const char*> names = {{900, "cudaErrorStreamCaptureUnsupported"},
                                                     {901, "cudaErrorStreamCaptureInvalidated"},
                                                     {904, "cudaErrorStreamCaptureUnjoined"},
                                                     {905, "cudaErrorStreamCaptureIsolation"},
                                                     {906, "cudaErrorStreamCaptureImplicit"},
                                                     {907, "cudaErrorCapturedEvent"}};
    auto found = names.find(error);
    return found == names.end() ? "cudaError of a pretended GPU" : found->second;
}
API const char* cudaGetErrorString(Error error) { return cudaGetErrorName(error); }
API Error cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                           cudaDriverEntryPointQueryResult* found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = (void*)+[]() -> int { return 801; };  // not supported
    if (found) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ---- memory
namespace {
std::map<uintptr_t, size_t> on_device, pinned;
size_t allocated = 0;
bool within(const std::map<uintptr_t, size_t>& blocks, const void* p) {
    LOCK;
    auto next = blocks.upper_bound((uintptr_t)p);
    return next != blocks.begin() && (uintptr_t)p < std::prev(next)->first + std::prev(next)->second;
}
}  // namespace

bool is_on_device(const void* p) { return within(on_device, p); }

API Error cudaMalloc(void** p, size_t size) {
    if (Error error = forbidden("cudaMalloc")) return error;
    LOCK;
    size = (size + 4096) & ~4095ul;
    if (allocated + size > MEMORY) return result(cudaErrorMemoryAllocation);
    *p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return result(cudaErrorMemoryAllocation);
    on_device[(uintptr_t)*p] = size;
    allocated += size;
    return cudaSuccess;
}
API Error cudaFree(void* p) {
    if (!p) return cudaSuccess;
    if (Error error = forbidden("cudaFree")) return error;
    LOCK;
    auto block = on_device.find((uintptr_t)p);
    if (block == on_device.end()) return result(cudaErrorInvalidValue);
    munmap(p, block->second);
    allocated -= block->second;
    on_device.erase(block);
    return cudaSuccess;
}
API Error cudaHostAlloc(void** p, size_t size, unsigned) {
    if (Error error = forbidden("cudaHostAlloc")) return error;
    LOCK;
    if (posix_memalign(p, 4096, size + 1)) return result(cudaErrorMemoryAllocation);
    pinned[(uintptr_t)*p] = size + 1;
    return cudaSuccess;
}
API Error cudaFreeHost(void* p) {
    if (Error error = forbidden("cudaFreeHost")) return error;
    LOCK;
    pinned.erase((uintptr_t)p);
    free(p);
    return cudaSuccess;
}
API Error cudaHostRegister(void* p, size_t size, unsigned) {
    LOCK;
    return pinned[(uintptr_t)p] = size, cudaSuccess;
}
API Error cudaHostUnregister(void* p) {
    LOCK;
    return pinned.erase((uintptr_t)p), cudaSuccess;
}
API Error cudaPointerGetAttributes(cudaPointerAttributes* found, const void* p) {
    memset(found, 0, sizeof *found);
    bool device = is_on_device(p), host = within(pinned, p);
    found->type = device ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->devicePointer = device || host ? (void*)p : nullptr;
    found->hostPointer = device ? nullptr : (void*)p;
    found->device = device || host ? 0 : -2;
    return cudaSuccess;
}
API Error cudaMemGetInfo(size_t* unused, size_t* total) { return *total = MEMORY, *unused = MEMORY - allocated, cudaSuccess; }
API Error cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    bool to_device = is_on_device(to), from_device = is_on_device(from);
    bool pageable = (!to_device && !within(pinned, to)) || (!from_device && !within(pinned, from));
    if (pageable && capturing(stream)) return breaks(capturing(stream), cudaErrorStreamCaptureUnsupported);
    if (!to_device && pageable) count("wait of a copy to pageable memory");
    std::string name = std::string("copy from ") + (from_device ? "device" : "host") + " to " + (to_device ? "device" : "host");
    return launch(stream, name, [=] { memmove(to, from, size); });
}
API Error cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    if (Error error = forbidden("cudaMemcpy")) return error;
    return memmove(to, from, size), cudaSuccess;
}
API Error cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
    return launch(stream, "memset", [=] { memset(to, value, size); });
}
API Error cudaMemset(void* to, int value, size_t size) {
    if (Error error = forbidden("cudaMemset")) return error;
    return memset(to, value, size), cudaSuccess;
}
API Error cudaGetSymbolAddress(void** p, const void*) {
    static char symbols[1 << 16];
    return *p = symbols, cudaSuccess;
}

// ---- streams and events
API Error cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    return *stream = (cudaStream_t) new Stream{flags, priority}, cudaSuccess;
}
API Error cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API Error cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API Error cudaStreamGetPriority(cudaStream_t stream, int* p) { return *p = of(stream) ? of(stream)->priority : 0, cudaSuccess; }
API Error cudaStreamQuery(cudaStream_t stream) {
    LOCK;
    return capturing(stream) ? breaks(capturing(stream), cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
API Error cudaStreamSynchronize(cudaStream_t stream) {
    LOCK;
    count("cudaStreamSynchronize");
    if (capturing(stream)) return breaks(capturing(stream), cudaErrorStreamCaptureUnsupported);
    return of(stream) ? cudaSuccess : default_stream();
}
API Error cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    return *event = (cudaEvent_t) new Event{!(flags & cudaEventDisableTiming)}, cudaSuccess;
}
API Error cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API Error cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // a wait may still name it
API Error cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    LOCK;
    auto& e = *(Event*)event;
    e.recorded = true, e.at = now(), e.capture = nullptr;
    if (Capture* capture = capturing(stream); capture && !(flags & cudaEventRecordExternal)) {
        if (!capture->valid) return result(cudaErrorStreamCaptureInvalidated);
        e.capture = capture, e.from = of(stream);
    }
    return cudaSuccess;
}
API Error cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
static Error look_at(cudaEvent_t event, const char* what) {
    LOCK;
    Capture* capture = ((Event*)event)->capture;
    if (captures.count(capture)) return breaks(capture, cudaErrorCapturedEvent);
    return forbidden(what);
}
API Error cudaEventQuery(cudaEvent_t event) { return look_at(event, "cudaEventQuery"); }
API Error cudaEventSynchronize(cudaEvent_t event) { return look_at(event, "cudaEventSynchronize"); }
API Error cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
    auto &a = *(Event*)begin, &b = *(Event*)end;
    if (a.capture || b.capture) return result(cudaErrorCapturedEvent);
    if (!a.recorded || !b.recorded || !a.timing || !b.timing) return result(cudaErrorInvalidResourceHandle);
    return *ms = std::max(1e-3, (b.at - a.at) * 1e3), cudaSuccess;
}
API Error cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    LOCK;
    auto& e = *(Event*)event;
    Capture* capture = captures.count(e.capture) ? e.capture : nullptr;
    Stream* waiting = of(stream);
    if (!capture)  // for work from before a capture
        return capturing(stream) && e.recorded ? breaks(capturing(stream), cudaErrorStreamCaptureIsolation) : cudaSuccess;
    if (!waiting) return breaks(capture, cudaErrorStreamCaptureImplicit);
    if (waiting->capture && waiting->capture != capture) return breaks(capture, cudaErrorStreamCaptureMerge);
    if (!waiting->capture) {
        waiting->capture = capture, waiting->joined = false;
        capture->streams.insert(waiting);
    } else if (waiting == capture->origin) {
        e.from->joined = true;
    }
    return cudaSuccess;
}
API Error cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    return launch(stream, "host function", [=] { function(data); });
}

// ---- captures
API Error cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) { return std::swap(*mode, own_mode), cudaSuccess; }
API Error cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    LOCK;
    Stream* origin = of(stream);
    if (!origin) return result(cudaErrorStreamCaptureUnsupported);
    if (origin->capture) return result(cudaErrorIllegalState);
    origin->capture = new Capture{++ids, mode, origin, pthread_self()};
    origin->capture->streams.insert(origin);
    captures.insert(origin->capture);
    return cudaSuccess;
}
API Error cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    LOCK;
    Capture* capture = capturing(stream);
    *graph = nullptr;
    if (!capture) return result(cudaErrorIllegalState);
    bool joined = true;
    for (Stream* each : capture->streams) {
        joined = joined && each->joined;
        each->capture = nullptr, each->joined = true;
    }
    captures.erase(capture);
    if (!capture->valid) return result(cudaErrorStreamCaptureInvalidated);
    if (!joined) return result(cudaErrorStreamCaptureUnjoined);
    if (!pthread_equal(capture->owner, pthread_self()) && capture->mode != cudaStreamCaptureModeRelaxed)
        return result(cudaErrorStreamCaptureWrongThread);
    last_graph.clear();
    for (const std::string& node : capture->graph->nodes) last_graph += node + "\n";
    return *graph = (cudaGraph_t)capture->graph, cudaSuccess;
}
static cudaStreamCaptureStatus status(Capture* capture) {
    return !capture         ? cudaStreamCaptureStatusNone
           : capture->valid ? cudaStreamCaptureStatusActive
                            : cudaStreamCaptureStatusInvalidated;
}
API Error cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* found) {
    LOCK;
    if (!of(stream))
        if (Error error = default_stream()) return error;
    return *found = status(capturing(stream)), cudaSuccess;
}
API Error cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* found, unsigned long long* id,
                                   cudaGraph_t* graph, const cudaGraphNode_t** before, const cudaGraphEdgeData** edges,
                                   size_t* n) {
    LOCK;
    Capture* capture = capturing(stream);
    *found = status(capture);
    static const cudaGraphNode_t none[1] = {};
    if (capture && id) *id = capture->id;
    if (capture && graph) *graph = (cudaGraph_t)capture->graph;
    if (before) *before = none;
    if (edges) *edges = nullptr;
    if (n) *n = 0;
    return cudaSuccess;
}
API Error cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    return *executable = (cudaGraphExec_t)graph, result(graph ? cudaSuccess : cudaErrorInvalidValue);
}
API Error cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
    LOCK;
    count("cudaGraphLaunch");
    return capturing(stream) ? breaks(capturing(stream), cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
API Error cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API Error cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
API Error cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* n) {
    auto& names = ((Graph*)graph)->nodes;
    if (!nodes) return *n = names.size(), cudaSuccess;
    for (size_t k = 0; k < *n; k++) nodes[k] = (cudaGraphNode_t)&names[k];
    return cudaSuccess;
}

// ---- PyTorch's own kernels
namespace {
std::unordered_map<const void*, std::string>& kernels() {
    static std::unordered_map<const void*, std::string> names;  // filled before main
    return names;
}
struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local std::vector<Configuration> pushed;
Error launch(const void* kernel, dim3 grid, dim3 block, cudaStream_t stream) {
    return launch(stream, kernels()[kernel], grid, block.x * block.y * block.z);
}
}  // namespace

API void** __cudaRegisterFatBinary(void*) {
    static void* handle[1];
    return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    LOCK;
    kernels()[host] = name;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
    return pushed.push_back({grid, block, shared, stream}), 0;
}
API Error __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    Configuration& top = pushed.back();
    *grid = top.grid, *block = top.block, *shared = top.shared, *(cudaStream_t*)stream = top.stream;
    return pushed.pop_back(), cudaSuccess;
}
API Error __cudaGetKernel(cudaKernel_t* kernel, const void* host) { return *kernel = (cudaKernel_t)host, cudaSuccess; }
API Error __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch((const void*)kernel, grid, block, stream);
}
API Error cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch(kernel, grid, block, stream);
}
API Error cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void**) {
    return launch(kernel, how->gridDim, how->blockDim, how->stream);
}
API Error cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
    return cudaSuccess;
}
API Error cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
    return *n = 8, cudaSuccess;
}

// ---- for the programs that run on it
API long pretended_count(const char* what) {
    LOCK;
    return counts[what];
}
API void pretended_reset() {
    LOCK;
    counts.clear();
}
API const char* pretended_graph() {  // the launches of the graph that was recorded last, a line each
    LOCK;
    return last_graph.c_str();
}
