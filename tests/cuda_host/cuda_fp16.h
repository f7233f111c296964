#pragma once
#include <immintrin.h>
struct __half { uint16_t bits; };
__attribute__((target("f16c"))) inline float __half2float(__half x) { return _cvtsh_ss(x.bits); }
__attribute__((target("f16c"))) inline __half __float2half(float x) { return {_cvtss_sh(x, 0)}; }
