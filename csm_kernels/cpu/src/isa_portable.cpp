#define CSM_NAMESPACE portable
#define CSM_WIDTH 4
#include "kernels.inc"

const csm::Isa* csm::isa_portable() { return csm::table("portable"); }
