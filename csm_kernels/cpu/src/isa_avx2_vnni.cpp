#include "isa.h"
#if defined(__AVXVNNI__)
#define CSM_NAMESPACE avx2_vnni
#define CSM_WIDTH 8
#include "kernels.inc"

const csm::Isa* csm::isa_avx2_vnni() { return csm::table("avx2vnni"); }
#else
const csm::Isa* csm::isa_avx2_vnni() { return nullptr; }
#endif
