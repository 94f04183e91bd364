#include "isa.h"
#if defined(__AVX2__)
#define CSM_NAMESPACE avx2
#define CSM_WIDTH 8
#include "kernels.inc"

const csm::Isa* csm::isa_avx2() { return csm::table("avx2"); }
#else
const csm::Isa* csm::isa_avx2() { return nullptr; }
#endif
