// For functions that the host's compiler and nvcc compile alike.
#pragma once

#if defined(__CUDACC__)
#define PYENGINE_BOTH __host__ __device__
#else
#define PYENGINE_BOTH
#endif
