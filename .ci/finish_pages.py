"""After the pages are rendered: each says which commit it was made from, and each article offers to open in Colab.

The `post-render` step of `_quarto.yml`: Quarto and the offline build call it where they render, with the folder of the pages in the environment.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPO = 'https://github.com/medxfer/medxfer_nb'
COLAB = REPO.replace('https://github.com', 'https://colab.research.google.com/github')
ARTICLES = ('tutorials', 'explanations', 'papers')


def page_of(notebook: Path) -> Path:
    "Where a notebook's page lies on the site: named without its number, as nbdev does."
    return notebook.relative_to(ROOT/'nbs').with_name(re.sub(r'^\d+[a-z]?_', '', notebook.name)).with_suffix('.html')


def git(*args: str) -> str:
    "What git says, or nothing outside a repository."
    try: return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError: return ''


def origin(notebook: Path) -> str:
    "The foot of a page: its notebook, and the commit and date that last changed it."
    path = notebook.relative_to(ROOT).as_posix()
    text = f'Made from <a href="{REPO}/blob/main/{path}">{path}</a>'
    if last := git('log', '-1', '--format=%H %cs', '--', path):
        commit, date = last.split()
        text += f' as of commit <a href="{REPO}/commit/{commit}">{commit[:10]}</a>, <time datetime="{date}">{date}</time>'
        if git('status', '--porcelain', '--', path): text += ', with changes that are not committed'
    return f'<p class="page-origin">{text}.</p>'


def colab(notebook: Path) -> str:
    path = notebook.relative_to(ROOT).as_posix()
    return (f'<p class="open-in-colab"><a href="{COLAB}/blob/main/{path}">Open in Colab</a>'
            f'<span>First cell there: <code>%pip install git+{REPO}</code></span></p>')


def finish(page: str, notebook: Path) -> str:
    if 'class="page-origin"' in page: return page
    if notebook.relative_to(ROOT/'nbs').parts[0] in ARTICLES:
        head, title, rest = page.partition('</h1>')
        block, end, rest = rest.partition('</header>')  # The end of the title block
        page = head + title + block + end + colab(notebook) + rest
    page, end, rest = page.rpartition('</main>')
    return page + origin(notebook) + end + rest


def main() -> None:
    folder = Path(os.environ.get('QUARTO_PROJECT_OUTPUT_DIR') or sys.argv[1])
    for notebook in sorted((ROOT/'nbs').rglob('*.ipynb')):
        page = folder/page_of(notebook)
        if '.ipynb_checkpoints' not in notebook.parts and page.exists(): page.write_text(finish(page.read_text(encoding='utf-8'), notebook), encoding='utf-8')


if __name__ == '__main__': main()
