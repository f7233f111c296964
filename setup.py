"Everything that can be said in settings.ini is said there."
from configparser import ConfigParser
from pathlib import Path
from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_name"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("fla", "hf", "dev")}


class WithSources(build_py):
    "Ships kernels/ inside the wheel, as rwkv_peft/kernels/sources."

    def run(self):
        super().run()
        if not self.editable_mode:
            for source in Path("kernels").glob("*.*"):
                self.copy_file(str(source), str(Path(self.build_lib, lib, "kernels", "sources", source.name)).replace("\\", "/"))


setup(
    name=lib, version=cfg["version"], description=cfg["description"], author=cfg["author"], author_email=cfg["author_email"],
    url=cfg["git_url"], keywords=cfg["keywords"].split(), license="Apache-2.0",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=[lib, f"{lib}.*"]), include_package_data=True, zip_safe=False,
    package_data={lib: ["models/*.safetensors", "models/*.json", "demo/*.jsonl"]},
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": ["rwkv-peft = rwkv_peft.cli:main"]},
    cmdclass={"build_py": WithSources},
)
