"""Builds the native CPU kernels, where there is a compiler, as a plain shared library that Python opens with ctypes.

It needs no headers of Python or torch, so one library serves all versions of both. Without a compiler the package is
installed without it: decoding on a CPU then goes through torch.compile, and ``csm-accelerate doctor`` says so.
CSM_KERNELS_REQUIRE_NATIVE=1 makes a failed build an error.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

REQUIRE = "CSM_KERNELS_REQUIRE_NATIVE"
SOURCES = Path("csm_kernels/cpu/src")
COMMON = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
    "-g0",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = {
    "isa_avx2": AVX2,
    "isa_avx2_vnni": [*AVX2, "-mavxvnni"],
    "isa_avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
}
"""Each instruction set is compiled for itself and chosen at run time; one that the compiler lacks is left out."""


class BuildNative(build_ext):
    """A shared library beside csm_kernels/cpu/library.py, each source with flags of its own."""

    def get_ext_filename(self, fullname):
        """Where it goes."""
        return os.path.join(*fullname.split(".")[:-1], "libcsm_cpu.so")  # asked with the package and without

    def build_extension(self, ext):
        """Compile and link, or warn."""
        try:
            self._build(ext)
        except Exception as error:
            if not ext.optional:
                raise
            print(f"warning: the native CPU kernels were not built ({error}); decoding on a CPU uses torch.compile")

    def _build(self, ext):
        x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")

        def compiled(source):
            flags = FLAGS.get(Path(source).stem, []) if x86 else []
            compile = self.compiler.compile
            args = dict(output_dir=self.build_temp, depends=ext.depends)
            try:
                return compile([source], extra_postargs=[*COMMON, *flags], **args)
            except Exception:
                if not flags:
                    raise
                return compile([source], extra_postargs=COMMON, **args)  # compiles to "not to be had"

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compiled, ext.sources) for path in paths]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread"], target_lang="c++"
        )


class PlainWheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self):
        """No Python's ABI is used."""
        return "py3", "none", super().get_tag()[2]


native = Extension(
    "csm_kernels.cpu._library",
    sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
    depends=sorted(str(path) for path in (*SOURCES.glob("*.h"), *SOURCES.glob("*.inc"))),
    optional=os.environ.get(REQUIRE) != "1",
)

if __name__ == "__main__":
    posix = sys.platform != "win32"  # the flags are those of gcc and clang
    setup(ext_modules=[native] if posix else [], cmdclass={"build_ext": BuildNative, "bdist_wheel": PlainWheel})
