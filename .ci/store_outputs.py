"""Copy the outputs of a finished `make reproduce` into the committed paper notebooks, and what the home page shows of them: python .ci/store_outputs.py results/demo"""
import base64, io, json, sys
from pathlib import Path

import home
from PIL import Image

COLOURS = (128, 32, 16)  # A figure's pixels in a palette: less than half the size, and no difference to the eye; fewer for large ones, which are lines on white
LARGE = 100_000          # Characters of base64: a notebook has to stay below 300 kB


def smaller(png: str) -> str:
    "A base64 PNG with a palette"
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
    for colours in COLOURS:
        image.quantize(colours, dither=Image.Dither.NONE).save(out := io.BytesIO(), 'PNG', optimize=True)
        if len(text := base64.b64encode(out.getvalue()).decode()) < LARGE: break
    return text


def kept(output: dict) -> dict | None:
    "What a reader wants of an output: no progress lines, no warnings"
    if output['output_type'] not in ('display_data', 'execute_result'): return None
    data = {k: v for k, v in output['data'].items() if k in ('text/plain', 'text/html', 'text/markdown', 'image/png')}
    if 'image/png' in data: data = {'image/png': smaller(''.join(data['image/png']))}
    if 'text/html' in data or 'text/markdown' in data: data.pop('text/plain', None)
    return dict(output, data=data, metadata={}) | ({'execution_count': None} if output['output_type'] == 'execute_result' else {})


def store(executed: Path, notebook: Path) -> None:
    "Outputs by cell; the sources stay those of the committed notebook"
    done = {c['id']: c for c in json.loads(executed.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'}
    book = json.loads(notebook.read_text(encoding='utf-8'))
    for cell in book['cells']:
        if cell['cell_type'] != 'code': continue
        ran = done.get(cell['id'])
        if ran is None or ran['source'] != cell['source']: sys.exit(f'{executed} was made from another version of {notebook}: run `make reproduce` again')
        cell['outputs'] = [o for o in map(kept, ran['outputs']) if o]
    notebook.write_text(json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')
    print(f'{notebook}: {notebook.stat().st_size/1e3:.0f} kB')


if __name__ == '__main__':
    for executed in sorted(Path(sys.argv[1]).glob('*/*.ipynb')): store(executed, Path('nbs/papers')/executed.parent.name/executed.name)
    home.main()
