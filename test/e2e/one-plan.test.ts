/** One plan, two layouts: the ONNX artifact and the safetensors artifact are the same model, bit for bit. */
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { openModelSource } from '../../src/artifacts/model-source.ts';
import { quantize } from '../../src/runs/quantize/quantize.ts';
import { type QuantizeRequest, quantizeRecipe } from '../../src/runs/quantize/recipe.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const at = (name: string) => join(scratch.path, name);

const run = (output: string, request: QuantizeRequest) =>
  quantize(at('model'), at(output), quantizeRecipe(request, 1), { overwrite: false, resume: false, dryRun: false });

/** Every layer's decoded weight, as bytes. */
async function decoded(path: string): Promise<{ kind: string; weights: Map<string, Buffer> }> {
  await using source = await openModelSource(path);
  const weights = new Map<string, Buffer>();
  for (const site of source.model.blocks.flatMap((block) => block.sites)) {
    const { buffer, byteOffset, byteLength } = await source.weights.loadSite(site);
    weights.set(site.name, Buffer.from(buffer as ArrayBuffer, byteOffset, byteLength));
  }
  return { kind: source.kind, weights };
}

it.each(['perm', 'perm-had', 'had'])(
  'an ONNX artifact and the safetensors artifact of its plan decode to identical weights (inputs under %s)',
  async (transform) => {
    await saveCheckpoint(at('model'), groupedLlama('one plan'));
    const request = { calibration: [scratch.write('text.txt', tinyText(800))], samples: 16, transform };
    const onnx = await run(`${transform}-onnx`, { ...request, groupSize: 32, bits: 2.4, formats: 'onnx' });
    const plan = join(at(`${transform}-onnx`), 'pcomp.json');
    const planes = await run(`${transform}-planes`, { ...request, plan, formats: 'safetensors' });
    expect(planes.plan).toEqual(onnx.plan);
    const bits = Object.values(onnx.plan.modules).flatMap((site) => site.bits);
    expect(new Set(bits).size).toBeGreaterThan(1);

    const a = await decoded(at(`${transform}-onnx`));
    const b = await decoded(at(`${transform}-planes`));
    expect([a.kind, b.kind]).toEqual(['onnx', 'planes']);
    expect(b.weights.size).toBe(14);
    for (const [name, weight] of a.weights) expect(Buffer.compare(weight, b.weights.get(name)!), name).toBe(0);
  },
);

it('the gptq layout, which no runtime transforms inputs for, sorts those whose order folds into the layers before', async () => {
  await saveCheckpoint(at('model'), groupedLlama('one plan', { intermediate_size: 192 }));
  const request = { calibration: [scratch.write('text.txt', tinyText(800))], samples: 16, formats: 'gptq', method: 'gptq' };
  const first = await run('gptq', { ...request, groupSize: 32, bits: 4 });
  const sorted = Object.entries(first.plan.modules).filter(([, { transform }]) => transform !== undefined);
  expect(sorted.map(([name, { transform }]) => [name, transform])).toEqual(
    [0, 1].map((b) => [`model.layers.${b}.mlp.down_proj`, 'perm']),
  );
  const again = await run('gptq-again', { ...request, plan: join(at('gptq'), 'pcomp.json') });
  expect(again.plan).toEqual(first.plan);
  expect(again.artifacts).toEqual(first.artifacts);
  const [a, b] = [await decoded(at('gptq')), await decoded(at('gptq-again'))];
  expect([a.kind, b.kind, a.weights.size]).toEqual(['gptq', 'gptq', 14]);
  for (const [name, weight] of a.weights) expect(Buffer.compare(weight, b.weights.get(name)!), name).toBe(0);
});
