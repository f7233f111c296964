#pragma once
struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
inline __nv_bfloat16 __float2bfloat16(float x) {                         // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return {(uint16_t)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
