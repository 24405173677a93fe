// What the two parts of the stand-in share.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <string>

#define API extern "C" __attribute__((visibility("default")))
#define NOTHING(name) \
    API int name() { return 0; }
using Error = cudaError_t;
using Work = std::function<void()>;

// A launch: written down where the stream is captured, else done (a kernel is nothing to do).
Error launch(void* stream, const std::string& name, const Work& work = {});
Error launch(void* stream, const std::string& name, dim3 grid, unsigned threads);
// A call that may wait for the device: an error while a capture is under way, for whom its mode says.
Error forbidden(const char* what);
bool is_on_device(const void* p);
