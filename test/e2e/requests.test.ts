/** Requests that cannot be met: one line that says why, the exit code of the contract, and nothing written or changed. */
import { cpSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { fromFloat32 } from '../../formats/dtype.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { folderTree } from '../support/folder-tree.ts';
import type { MemorySource } from '../support/memory-source.ts';
import { runCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const scratch = scratchFolder();
/** Where every command runs and would write. */
const desk = join(scratch.path, 'desk');
const RTN = ['--bits', '2', '--method', 'rtn', '--group-size', '32'];
let before: Record<string, string>;

beforeAll(async () => {
  mkdirSync(desk);
  await saveCheckpoint(join(desk, 'model'), groupedLlama());
  await saveCheckpoint(join(desk, 'narrow'), tinyLlama('narrow', { hidden_size: 40, num_attention_heads: 5, head_dim: 8 }));
  const made = await runCli(['quantize', 'model', ...RTN, '-o', 'taken', '--quiet'], { cwd: desk });
  expect(made).toMatchObject({ code: 0, stderr: '' });
  const copy = (name: string) => {
    cpSync(join(desk, 'model'), join(desk, name), { recursive: true });
    return join(desk, name);
  };
  const config = { ...groupedLlama().config };
  const reconfigure = (name: string, changes: object) => {
    writeFileSync(join(copy(name), 'config.json'), JSON.stringify({ ...config, ...changes }));
  };
  reconfigure('unknown', { architectures: ['FrobForCausalLM'] });
  reconfigure('awq', { quantization_config: { quant_method: 'awq', bits: 4 } });
  reconfigure('other-vocabulary', { vocab_size: 40 });
  rmSync(join(copy('no-tokenizer'), 'tokenizer.json'));
  rmSync(join(copy('no-config'), 'config.json'));
  rmSync(join(copy('no-weights'), 'model.safetensors'));
  writeFileSync(join(copy('broken-config'), 'config.json'), '{');
  writeFileSync(join(copy('broken-weights'), 'model.safetensors'), 'short');
  writeFileSync(join(copy('broken-generation'), 'generation_config.json'), '{"eos_token_id": 2,}');
  const infinite = groupedLlama('infinite');
  spoil(infinite.source, 'model.layers.1.mlp.down_proj.weight', 3 * 172 + 7, Number.NEGATIVE_INFINITY);
  await saveCheckpoint(join(desk, 'infinite'), infinite);
  writeFileSync(join(desk, 'text.txt'), tinyText(300));
  writeFileSync(join(desk, 'empty.txt'), '');
  writeFileSync(join(desk, 'unknown.yaml'), 'bits: 2\nfrob: 4\n');
  writeFileSync(join(desk, 'circle.yaml'), 'bits: &bits [*bits]\n');
  const plan = (modules: object) => JSON.stringify({ modules });
  const q = 'model.layers.0.self_attn.q_proj';
  writeFileSync(join(desk, 'stranger.json'), plan({ 'model.layers.9.mlp.up_proj': { groupSize: 32, bits: [2] } }));
  writeFileSync(join(desk, 'short.json'), plan({ [q]: { groupSize: 32, bits: [2] } }));
  writeFileSync(join(desk, 'part.json'), plan({ [q]: { groupSize: 32, bits: [2, 3] } }));
  writeFileSync(join(desk, 'coarse.json'), plan({ [q]: { groupSize: 256, bits: [2] } }));
  mkdirSync(join(desk, 'mine'));
  writeFileSync(join(desk, 'mine', 'diary.txt'), 'dear diary');
  before = folderTree(desk);
});

/** Puts a value into an F32 tensor. */
function spoil(source: MemorySource, name: string, at: number, value: number): void {
  const { dtype, shape } = source.tensors.get(name)!;
  const values = source.values(name)!;
  values[at] = value;
  source.add(name, dtype, shape, fromFloat32('F32', values));
}

const quantize = (line: string, ...rest: string[]) => ['quantize', ...line.split(' '), ...rest];
const SLIM = '--bits 2 --group-size 32';
const rtn = RTN.join(' ');

describe('wrong requests end with code 2', () => {
  it.concurrent.each<[string | RegExp, string[]]>([
    ["unknown command 'frob'", ['frob']],
    ["unknown option '--bitz' (Did you mean --bits?)", quantize('model -o out --bitz 3')],
    ['-o: the name of a folder to write is needed', quantize('model --bits 2')],
    ['-o: the name of a folder to write is needed', quantize(`model ${rtn} -o`, '')],
    ['--bits: a budget is required, e.g. --bits 2', quantize('model -o out')],
    ['--bits 9: must be within 1..8. To keep a layer as it is, use --skip.', quantize('model --bits 9 -o out')],
    ['--bits 2.5: must be a whole number under preset paper', quantize('model --bits 2.5 --preset paper -o out')],
    [
      '--bits, --bpw: one budget at a time; give one of --bits, --bpw, --size, --runtime-memory, --max-loss',
      quantize('model --bits 2 --bpw 3 -o out'),
    ],
    [
      /^--alpha: preset paper does not use it; it goes with --preset best/,
      quantize('model --bits 2 --preset paper --alpha 1 -o out'),
    ],
    [
      /^--bpw 1.01: below what groups of 32 can reach; the smallest is --bpw \d\.\d+, and beyond --bpw \d/,
      quantize('model --bpw 1.01 --method rtn --group-size 32 -o out'),
    ],
    [
      /^--size 1000: below what groups of 32 can reach; the smallest is --size \d+.* --embeddings 4 or 8 makes/,
      quantize('model --size 1000 --method rtn --group-size 32 -o out'),
    ],
    [/^--act-order: --method rtn does not use it/, quantize(`model ${rtn} --act-order -o out`)],
    [/^--bits 2: the plan says every width/, quantize('model --bits 2 --plan short.json -o out')],
    [/^--max-memory 5XB: a size is a number with kB, MB, GB/, quantize(`model ${rtn} --max-memory 5XB -o out`)],
    [/^--frob: no such option of quantize; known: --method /, quantize('model --recipe unknown.yaml -o out')],
    [/^--recipe circle.yaml: not YAML or JSON: .*circular/, quantize('model --recipe circle.yaml -o out')],
    [
      /^--skip \*.frob: matches none of the 14 modules, which are named like model.layers.0.self_attn.q_proj/,
      quantize(`model ${rtn} -o out --skip *.frob`),
    ],
    [/^--skip, --only: none of the 14 linear layers is left/, quantize(`model ${rtn} -o out --skip *`)],
    ['--calibration *.md: no file matches', quantize(`model ${SLIM} -o out --calibration *.md`)],
    ['empty.txt: no text in it', quantize(`model ${SLIM} -o out --calibration empty.txt`)],
    [
      /^unknown.config.json: architecture "FrobForCausalLM" is not supported; supported: LlamaForCausalLM, .*GPT2LMHeadModel/,
      quantize(`unknown ${rtn} -o out`),
    ],
    [/^awq.config.json: "quantization_config" is .*; the checkpoint is quantized already/, quantize(`awq ${rtn} -o out`)],
    ['taken: is quantized already (layout onnx); give the float model it was made from', quantize(`taken ${rtn} -o out`)],
    ['taken: exists. Replace it with --overwrite, or choose another -o.', quantize(`model ${rtn} -o taken`)],
    [/^mine: --overwrite replaces outputs of pcomp, and this has no pcomp.json/, quantize(`model ${rtn} -o mine --overwrite`)],
    ['--plan stranger.json: the model has no module "model.layers.9.mlp.up_proj"', quantize('model --plan stranger.json -o out')],
    [
      /^--plan part.json: no widths for module "model.layers.0.self_attn.k_proj"; leave it as it is with --skip/,
      quantize('model --plan part.json -o out'),
    ],
    [
      /^--plan coarse.json: "model.layers.0.self_attn.q_proj" has groups of 256: onnxruntime runs/,
      quantize('model --plan coarse.json --only *.0.*q_proj -o out'),
    ],
    [
      /^--format gptq: the layout can hold none of the layers to quantize; "model.layers.0.self_attn.q_proj" has 5 bits/,
      quantize('model --method rtn --bits 5 --group-size 32 --format gptq -o out'),
    ],
    [
      /^--embeddings 4: rows of 40 values do not divide into blocks of 16 or more/,
      quantize(`narrow ${rtn} --embeddings 4 -o out`),
    ],
    [/^--accuracy fast: model is no ONNX artifact/, ['evaluate', 'model', '--text', 'text.txt', '--accuracy', 'fast']],
    ["required option '--text <files...>' not specified", ['evaluate', 'model']],
    ['--sequence-length 1: must be within 2..1048576', ['evaluate', 'model', '--text', 'text.txt', '--sequence-length', '1']],
    [/^no-weights: no weights in this folder/, ['inspect', 'no-weights']],
    [
      /^infinite.model.safetensors: tensor "model.layers.1.mlp.down_proj.weight" holds -Infinity at \[3, 7\]; only finite weights can be quantized/,
      quantize(`infinite ${rtn} -o out`),
    ],
    ['--verify: goes without --groups and --tensors', ['inspect', 'taken', '--verify', '--tensors']],
  ])('%s', async (expected, args) => {
    const { code, stdout, stderr } = await runCli([...args], { cwd: desk });
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' });
    expectOneLine(stderr, expected);
  });
});

describe('broken files and missing things end with code 1', () => {
  it.concurrent.each<[string | RegExp, string[]]>([
    ['nowhere: cannot be read (ENOENT)', quantize(`nowhere ${rtn} -o out`)],
    [/^no-config.config.json: cannot be read \(ENOENT\); a model needs its config.json/, quantize(`no-config ${rtn} -o out`)],
    [/^broken-weights.model.safetensors: .*has 5 \[[a-z-]+\]/, quantize(`broken-weights ${rtn} -o out`)],
    [
      /^no-tokenizer.tokenizer.json: there is no such file.*\[tokenizer-missing\]/,
      quantize(`no-tokenizer ${SLIM} --calibration text.txt -o out`),
    ],
    [
      /^broken-generation.generation_config.json: not JSON \[generation-config-not-json\]/,
      quantize(`broken-generation ${SLIM} --calibration text.txt --dry-run -o out`),
    ],
    [/^model.pcomp.json: no such file or folder/, ['inspect', 'model', '--verify']],
    ['missing.txt: cannot be read (ENOENT)', quantize(`model ${SLIM} --calibration missing.txt -o out`)],
    ['--plan missing.json: cannot be read (ENOENT)', quantize('model --plan missing.json -o out')],
    [/cannot be made \(E[A-Z]+\); choose another -o/, quantize(`model ${rtn} -o ${join('text.txt', 'out')}`)],
    [/^no-tokenizer.tokenizer.json: /, ['evaluate', 'no-tokenizer', '--text', 'text.txt']],
    [/^other-vocabulary.*: /, ['evaluate', 'other-vocabulary', '--text', 'text.txt']],
  ])('%s', async (expected, args) => {
    const { code, stdout, stderr } = await runCli([...args], { cwd: desk });
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expectOneLine(stderr, expected);
  });
});

function expectOneLine(stderr: string, expected: string | RegExp): void {
  expect(stderr.split('\n')).toEqual([expect.stringMatching(/^pcomp: [ -~]+$/), '']);
  const said = stderr.slice('pcomp: '.length, -1);
  if (typeof expected === 'string') expect(said).toBe(expected);
  else expect(said).toMatch(expected);
}

it('a bug is told from these by its stack, and leaves nothing either', async () => {
  // No input is known to hit one: a run that its thread has never heard of stands for it.
  const trap =
    "data:text/javascript,import{Worker}from'node:worker_threads';const{postMessage}=Worker.prototype;" +
    "Worker.prototype.postMessage=function(order,...rest){postMessage.call(this,order.job&&{job:{...order.job,name:'unforeseen'}}||order,...rest)}";
  const { code, stdout, stderr } = await runCli(quantize(`model ${rtn} --preset paper -o out --quiet`), {
    cwd: desk,
    nodeArgs: ['--import', trap],
  });
  expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
  expect(stderr).toMatch(/^pcomp: this is a bug, please report it\nTypeError: .*not a function\n {4}at /);
});

it('nothing was written, and what was there is as it was', () => {
  expect(folderTree(desk)).toEqual(before);
});
