"Everything that can be said in settings.ini is said there."
from configparser import ConfigParser
from pathlib import Path
import platform
import sys
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_name"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("fla", "hf", "data", "eval", "gguf", "peers", "nvcc", "dev")}


class WithSources(build_py):
    "Ships kernels/ inside the wheel, as rwkv_peft/kernels/sources."

    def run(self):
        super().run()
        if not self.editable_mode:
            self.mkpath(str(Path(self.build_lib, lib, "kernels", "sources")))
            for source in Path("kernels").glob("*.*"):
                self.copy_file(str(source), str(Path(self.build_lib, lib, "kernels", "sources", source.name)).replace("\\", "/"))


class Optional(build_ext):
    "Builds what it can: without a compiler the package installs all the same, and `kernels.native_status()` says what is missing."

    def build_extension(self, ext):
        shared, self.build_temp = self.build_temp, str(Path(self.build_temp, ext.name))    # same sources, other flags: keep the object files apart
        try: super().build_extension(ext)
        except Exception as error: print(f"{ext.name} was not built ({error}); RWKV will run on PyTorch alone, only slower", file=sys.stderr)
        finally: self.build_temp = shared


def native() -> list[Extension]:
    "kernels/*.cpp once per x86-64 instruction set; the right one is picked when it is first used. Plain C functions for ctypes, so no Python or torch header is needed."
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64") or sys.maxsize < 2**32: return []
    flags = "-std=gnu++17 -O3 -g0 -fno-exceptions -fno-math-errno -fno-trapping-math -Wno-psabi -w".split()
    sets = {"base": [], "avx2": "-mavx2 -mfma".split(),
            "avx512": "-mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512".split()}
    sources = sorted(map(str, Path("kernels").glob("*.cpp")))
    # -fopenmp only when compiling: linked without it, the calls find the OpenMP that torch has loaded, instead of a second one with threads of its own
    return [Extension(f"{lib}.kernels._native_{name}", sources, depends=sorted(map(str, Path("kernels").glob("*.h"))), language="c++", optional=True,
                      extra_compile_args=[*flags, "-fopenmp", *own]) for name, own in sets.items()] if sources else []


setup(
    name=lib, version=cfg["version"], description=cfg["description"], author=cfg["author"], author_email=cfg["author_email"],
    url=cfg["git_url"], keywords=cfg["keywords"].split(), license="Apache-2.0",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=[lib, f"{lib}.*"]), include_package_data=True, zip_safe=False,
    package_data={lib: ["models/*.safetensors", "models/*.json", "demo/*.jsonl"]},
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": ["rwkv-peft = rwkv_peft.cli:main"]},
    options={"editable_wheel": {"mode": "compat"}},     # so that a notebook in the folder above the checkout finds the package, and not the folder
    ext_modules=native(), cmdclass={"build_py": WithSources, "build_ext": Optional},
)
