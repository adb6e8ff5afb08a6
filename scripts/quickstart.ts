/** The main job on the model that ships with pcomp: quantize to 2 bits, evaluate before and after, generate through the written ONNX. */
import { spawnSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { loadTokenizer } from '../src/calibration/tokenizer.ts';
import { createEngine } from '../src/compute/ort.ts';
import { generate } from '../src/runs/evaluate/generate.ts';

const root = fileURLToPath(new URL('..', import.meta.url));
const at = (path: string) => relative(process.cwd(), join(root, path)) || '.';
const model = at('fixtures/lab/base');
const calibration = at('fixtures/lab/text/python.train.txt');
const text = at('fixtures/lab/text/python.eval.txt');
const output = at('out/quickstart');
const PROMPT = 'def __init__(self, name):\n        self.name =';

/** Runs pcomp from source, as `npx pcomp` runs it built. */
function pcomp(...args: string[]): void {
  console.log(`\n$ npx pcomp ${args.join(' ')}`);
  const { status } = spawnSync(process.execPath, ['--import', 'tsx', join(root, 'cli/pcomp.ts'), ...args], { stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}

rmSync(output, { recursive: true, force: true });
pcomp('evaluate', model, '--text', text);
pcomp('quantize', model, '--bits', '2', '--calibration', calibration, '-o', output);
pcomp('evaluate', output, '--text', text, '--against', model);

await using source = await openModelSource(output);
await using engine = await createEngine();
const tokenizer = await loadTokenizer(output, source.model.shape.vocabSize);
const prompt = tokenizer.encode(PROMPT);
if (source.onnxPath === undefined) throw new Error(`${output} holds no ONNX model`);
const tokens = await generate(engine, source.model, source.onnxPath, prompt, { maxNewTokens: 24 });
console.log(`\nGreedy text through ${relative(process.cwd(), source.onnxPath)}, after "${PROMPT.split('\n')[0]} ...":`);
console.log(tokenizer.decode([...prompt, ...tokens]));
