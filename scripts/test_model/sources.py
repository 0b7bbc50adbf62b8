"""The packages the corpus is made of, and which of their pages are text worth learning."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One Debian package: where its pages lie, which are taken, and under which licence."""

    package: str
    version: str
    folder: str  # of the pages, below /
    root: tuple[str, str, str]  # tag, attribute and value of the element that holds the text
    licence: str  # SPDX
    holder: str
    include: str = r".*"  # full match on the path below `folder`
    exclude: str = r"(?!)"

    def pages(self, unpacked: Path) -> list[Path]:
        """All pages taken, in a fixed order."""
        base = unpacked / self.package / self.folder
        taken = []
        for path in base.rglob("*.html"):
            name = path.relative_to(base).as_posix()
            generic = re.search(r"(^|/)(genindex|py-modindex|search|index-all)[^/]*$", name)
            if generic or path.is_symlink():
                continue
            if re.fullmatch(self.include, name) and not re.fullmatch(self.exclude, name):
                taken.append(path)
        return sorted(taken, key=lambda path: path.as_posix())


MAIN = ("div", "role", "main")
SOURCES = (
    Source(
        "python3.11-doc", "3.11.2-6+deb12u9", "usr/share/doc/python3.11/html", MAIN,
        "PSF-2.0", "2001-2026 Python Software Foundation",
        exclude=r"whatsnew/changelog\.html|(license|copyright|contents|index|download)\.html",
    ),
    Source(
        "postgresql-doc-15", "15.20-0+deb12u1", "usr/share/doc/postgresql-doc-15/html",
        ("body", "", ""),
        "PostgreSQL", "1996-2026 The PostgreSQL Global Development Group; "
        "1994 The Regents of the University of California",
        exclude=r"release-.*|bookindex\.html|legalnotice\.html|biblio\.html|index\.html",
    ),
    Source(
        "sqlite3-doc", "3.40.1-2+deb12u2", "usr/share/doc/sqlite3", ("body", "", ""),
        "blessing (public domain)", "none",
        exclude=r"(releaselog|matrix|syntax)/.*|hlr.*|keyword_index\.html|changes\.html|toc.*",
    ),
    Source(
        "python-django-doc", "3:3.2.25-0+deb12u7", "usr/share/doc/python-django-doc/html",
        ("div", "id", "yui-main"),
        "BSD-3-Clause", "Django Software Foundation and individual contributors",
        exclude=r"_modules/.*|releases/[0-9.]+\.[1-9][0-9]*\.html|contents\.html",
    ),
    Source(
        "python-sqlalchemy-doc", "1.4.46+ds1-1", "usr/share/doc/python-sqlalchemy-doc/html",
        ("div", "id", "docs-body"),
        "MIT", "2005-2023 the SQLAlchemy authors and contributors",
        exclude=r"_modules/.*|changelog/changelog_.*|copyright\.html|contents\.html",
    ),
    Source(
        "nodejs-doc", "18.20.4+dfsg-1~deb12u3", "usr/share/doc/nodejs/api",
        ("div", "id", "apicontent"), "MIT", "Node.js contributors; Joyent, Inc.",
        exclude=r"all\.html|index\.html",
    ),
    Source(
        "rust-doc", "1.63.0+dfsg1-2", "usr/share/doc/rust-doc/html", ("main", "", ""),
        "MIT OR Apache-2.0", "The Rust Project Developers",
        include=r"(book|reference|nomicon|rust-by-example|edition-guide|embedded-book|rustc"
        r"|rustdoc)/.*",
        exclude=r"book/(2018-edition|first-edition|second-edition)/.*|.*print\.html|.*toc\.html",
    ),
    Source(
        "cmake-doc", "3.25.1-1", "usr/share/doc/cmake-data/html", MAIN,
        "BSD-3-Clause", "2000-2023 Kitware, Inc. and Contributors",
    ),
    Source(
        "llvm-14-doc", "1:14.0.6-12", "usr/share/doc/llvm-14-doc/html", MAIN,
        "Apache-2.0 WITH LLVM-exception", "2003-2022 LLVM Project",
        exclude=r"AMDGPU/.*",
    ),
    Source(
        "python-sklearn-doc", "1.2.1+dfsg-1", "usr/share/doc/python-sklearn-doc/html", MAIN,
        "BSD-3-Clause", "2007-2023 The scikit-learn developers",
        exclude=r"auto_examples/(index|sg_execution_times)\.html|_modules/.*|whats_new/older.*",
    ),
    Source(
        "python-pandas-doc", "1.5.3+dfsg-2", "usr/share/doc/python-pandas-doc/html",
        ("main", "role", "main"),
        "BSD-3-Clause", "2008-2023 AQR Capital Management, LLC, Lambda Foundry, Inc., PyData "
        "Development Team and open source contributors",
        include=r"(user_guide|getting_started|development|whatsnew)/.*",
    ),
    Source(
        "python-scipy-doc", "1.10.1-2", "usr/share/doc/python-scipy-doc/html",
        ("main", "role", "main"),
        "BSD-3-Clause", "2001-2002 Enthought, Inc.; 2003-2023 SciPy Developers",
        include=r"(tutorial|dev|release|reference)/.*",
        exclude=r"reference/generated/.*\.[A-Za-z_0-9]+\.[a-z_0-9]+\.[a-z_0-9]+\.html",
    ),
    Source(
        "erlang-doc", "1:25.2.3+dfsg-1+deb12u4", "usr/share/doc/erlang-doc",
        ("div", "class", "innertube"),
        "Apache-2.0", "1997-2023 Ericsson AB",
        include=r"(doc|lib/[^/]*/doc/html|erts-[^/]*/doc/html)/.*",
        exclude=r"lib/(wx|megaco|snmp|jinterface|odbc|et)-.*|.*notes.*|.*/release_notes.*",
    ),
)  # fmt: skip
