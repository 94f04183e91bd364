#include "isa.h"
#if defined(__AVX512VNNI__)
#define CSM_NAMESPACE avx512
#define CSM_WIDTH 16
#include "kernels.inc"

const csm::Isa* csm::isa_avx512() { return csm::table("avx512"); }
#else
const csm::Isa* csm::isa_avx512() { return nullptr; }
#endif
