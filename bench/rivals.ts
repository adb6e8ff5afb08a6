/**
 * pcomp beside other quantizers: same model, same calibration text and windows, same scorer, same stored bits.
 * `npx tsx bench/rivals.ts [lab] [stories] [--python PATH] [--only TEXT]`; rows replace those of the same name in bench/results/rivals.{json,md}.
 *
 * A rival (bench/rivals/) decodes its weights into a float checkpoint, and `pcomp evaluate` scores that. Beside it stands
 * `pcomp quantize --bpw` (preset best) with what the rival stores, all counted. Python with bench/rivals/requirements.txt comes from
 * `--python`; llama.cpp's types need LLAMA_QUANTIZE, the path of llama-quantize. What is absent is skipped, and the notes say why.
 */
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';
import { evaluate, type QuantizeRequest, quantize, quantizeRecipe } from '../src/index.ts';
import { type Row, writeResults } from './results.ts';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));
const shared = process.env['PCOMP_TEST_DATA'] ?? root('../shared/data');
const threads = availableParallelism();
const SAMPLES = 128;

interface Case {
  readonly model: string;
  readonly calibration: string;
  readonly text: string;
  readonly groupSize: number;
  readonly sequence: number;
  /** Label, file in bench/rivals/, options. */
  readonly rivals: readonly (readonly [string, string, Readonly<Record<string, unknown>>])[];
}

const llama = (...types: readonly string[]) =>
  types.map((type) => [`llama.cpp ${type}, importance matrix`, 'llama', { type }] as const);
const general = (group: number) =>
  [
    [`onnxruntime MatMulNBits, default, 2 bits, g${group}`, 'ort', { variant: 'default', bits: 2, group }],
    [`onnxruntime MatMulNBits, HQQ, 2 bits, g${group}`, 'ort', { variant: 'hqq', bits: 2, group }],
    [`HQQ, 2 bits, g${group}`, 'hqq', { bits: 2, group }],
    [`onnxruntime MatMulNBits, default, 4 bits, g${group}`, 'ort', { variant: 'default', bits: 4, group }],
    [`onnxruntime MatMulNBits, HQQ, 4 bits, g${group}`, 'ort', { variant: 'hqq', bits: 4, group }],
    ['onnxruntime MatMulNBits, k_quant, 4 bits', 'ort', { variant: 'k_quant', bits: 4, group: 32 }],
    [`AutoRound, 2 bits, g${group}`, 'autoround', { bits: 2, group }],
  ] as const;

const CASES: Readonly<Record<string, Case>> = {
  lab: {
    model: root('fixtures/lab/base'),
    calibration: root('fixtures/lab/text/python.train.txt'),
    text: root('fixtures/lab/text/python.eval.txt'),
    groupSize: 128,
    sequence: 256,
    rivals: [
      ...llama('IQ2_XXS', 'IQ2_XS', 'Q2_K_S', 'IQ1_M', 'IQ2_S', 'IQ3_XXS', 'Q4_K_S'),
      ['llama.cpp Q2_K_S, no importance matrix', 'llama', { type: 'Q2_K_S', importance: false }],
      ['HQQ, 2 bits, g64', 'hqq', { bits: 2, group: 64 }],
      ...general(128),
    ],
  },
  stories: {
    model: join(shared, 'stories260k'),
    calibration: join(shared, 'text/tinystories.197k.txt'),
    text: join(shared, 'text/tinystories.valid.30k.txt'),
    groupSize: 32,
    sequence: 512,
    rivals: [...llama('IQ2_XXS', 'Q2_K_S'), ...general(32)],
  },
};

/** What else pcomp has, at the bits it comes out at; each stands beside preset best at those, like a rival. */
const OWN: readonly [string, QuantizeRequest][] = [
  ['pcomp rtn, paper, 2 bits', { method: 'rtn', preset: 'paper', bits: 2 }],
  ['pcomp gptq, act-order, paper, 2 bits', { method: 'gptq', preset: 'paper', actOrder: true, bits: 2 }],
  ['pcomp slim-llm, paper, 2 bits', { method: 'slim-llm', preset: 'paper', bits: 2 }],
];

interface Scored {
  readonly bpw: number;
  readonly perplexity: number;
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { python: { type: 'string', default: 'python3' }, only: { type: 'string', default: '' } },
});
for (const name of positionals.length > 0 ? positionals : Object.keys(CASES)) await compare(name, CASES[name]);

async function compare(name: string, from: Case): Promise<void> {
  const scratch = await mkdtemp(join(tmpdir(), 'pcomp-rivals-'));
  try {
    const float = await score(from, from.model);
    const best = new Map<string, Scored>();
    const makers = [
      ...OWN.map(([label, request]) => [label, () => own(from, scratch, request)] as const),
      ...from.rivals.map(([label, rival, options]) => [label, () => rivalOf(from, scratch, rival, options)] as const),
    ];
    for (const [label, make] of makers.filter(([text]) => text.includes(values.only))) {
      try {
        const { bpw, perplexity } = await make();
        const budget = bpw.toFixed(3);
        const ours = best.get(budget) ?? (await own(from, scratch, { bpw: Number(budget) }));
        best.set(budget, ours);
        await keep({
          model: name,
          quantizer: label,
          'stored bpw': bpw,
          perplexity,
          'rise, nats': Math.log(perplexity / float.perplexity),
          'pcomp best, stored bpw': ours.bpw,
          'pcomp best, perplexity': ours.perplexity,
          'pcomp best, rise, nats': Math.log(ours.perplexity / float.perplexity),
          'pcomp best': ours.perplexity < perplexity ? 'better' : 'worse',
        });
      } catch (error) {
        await keep({ model: name, quantizer: label, 'pcomp best': `not compared: ${reason(error)}` });
      }
    }
    if ('float'.includes(values.only))
      await keep({ model: name, quantizer: 'float', ...{ 'stored bpw': float.bpw }, perplexity: float.perplexity });
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

async function score({ text, sequence }: Case, folder: string): Promise<Scored> {
  const { perplexity, bitsPerWeight } = await evaluate(folder, {
    text: [text],
    sequenceLength: sequence,
    accuracy: 'exact',
    device: 'cpu',
    threads,
    maxMemory: 2 ** 30,
  });
  return { bpw: bitsPerWeight, perplexity };
}

async function own(from: Case, scratch: string, request: QuantizeRequest): Promise<Scored> {
  const output = join(scratch, 'own');
  const text =
    request.method === 'rtn' ? {} : { calibration: [from.calibration], samples: SAMPLES, sequenceLength: from.sequence };
  const recipe = quantizeRecipe({ groupSize: from.groupSize, ...text, ...request }, threads);
  await quantize(from.model, output, recipe, { overwrite: true, resume: false, dryRun: false });
  return await score(from, output);
}

async function rivalOf(from: Case, scratch: string, rival: string, options: Readonly<Record<string, unknown>>): Promise<Scored> {
  const output = join(scratch, 'rival');
  await rm(output, { recursive: true, force: true });
  const all = { ...options, calibration: from.calibration, samples: SAMPLES, sequence: from.sequence };
  const { stdout } = await promisify(execFile)(
    values.python,
    [root('bench/rivals/run.py'), 'quantize', rival, from.model, output, JSON.stringify(all)],
    // Models and texts are local; a package that would ask the network for another is to fail.
    { maxBuffer: 2 ** 26, cwd: scratch, env: { ...process.env, HF_HUB_OFFLINE: '1' } },
  );
  const { storedBits } = JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as { storedBits: number };
  return { bpw: storedBits, perplexity: (await score(from, output)).perplexity };
}

/** The last line of what a program or pcomp complained about. */
function reason(error: unknown): string {
  const { stderr, message } = error as Error & { stderr?: string };
  return (stderr?.trim() || message).split('\n').at(-1) ?? '';
}

async function keep(row: Row): Promise<void> {
  console.error(JSON.stringify(row));
  const text = await readFile(root('bench/results/rivals.json'), 'utf8').catch(() => '{"rows":[]}');
  const earlier = (JSON.parse(text) as { rows: Row[] }).rows;
  const rows = [...earlier.filter(({ model, quantizer }) => model !== row['model'] || quantizer !== row['quantizer']), row];
  rows.sort((a, b) => compareText(a['model'], b['model']) || Number(a['stored bpw'] ?? 99) - Number(b['stored bpw'] ?? 99));
  await writeResults('rivals', 'npx tsx bench/rivals.ts', rows, [
    'Stored bpw: codes, scales, zero points, tables and padding of the linear layers as each format holds them. Rise: nats a token over the float model. ' +
      'pcomp best: `pcomp quantize --bpw` with what the row stores (three digits), never more than that.',
  ]);
}

function compareText(a: number | string | undefined, b: number | string | undefined): number {
  return String(a).localeCompare(String(b));
}
