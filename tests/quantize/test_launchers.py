"""Extensions of one name, as Triton loads them."""

import os
import subprocess
import sysconfig

import pytest

from pipeline.quantize.launchers import keep_apart

build = pytest.importorskip("triton.runtime.build", reason="needs Triton")

SOURCE = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"launch", launch, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___triton_launcher(void) { return PyModule_Create(&def); }
"""


@pytest.fixture
def extensions(tmp_path):
    compiler = os.environ.get("CC", "cc")
    include = sysconfig.get_paths()["include"]
    paths = []
    for number in range(2):
        source, path = tmp_path / f"{number}.c", tmp_path / f"{number}.so"
        source.write_text(SOURCE % number)
        command = [compiler, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs a C compiler and Python's headers ({error})")
        paths.append(str(path))
    return paths


def test_launchers_that_are_loaded_twice_stay_apart(extensions, monkeypatch):
    monkeypatch.setattr(build, "_load_module_from_path", build._load_module_from_path)
    keep_apart()
    keep_apart()
    loaded = [
        build._load_module_from_path("__triton_launcher", path) for path in extensions + extensions
    ]
    assert [module.launch() for module in loaded] == [0, 1, 0, 1]
