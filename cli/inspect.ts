/** `pcomp inspect ARTIFACT`: tensors, widths per site and group, sizes, and where the bytes went. */
import { Command } from 'commander';
import { FormatError, RecipeError } from '../src/errors.ts';
import { inspectAdapter } from '../src/runs/adapt/convert.ts';
import { type InspectedModule, type Inspection, inspect } from '../src/runs/inspect/inspect.ts';
import { type Verification, verifyArtifact } from '../src/runs/inspect/verify-artifact.ts';
import { formatSize } from '../src/runs/size.ts';
import { renderAdapter } from './inspect-adapter.ts';
import { jsonOption } from './options.ts';
import { createConsole } from './ui/console.ts';
import { renderPairs, renderTable } from './ui/table.ts';

export function inspectCommand(signal: AbortSignal): Command {
  return new Command('inspect')
    .description('Show what is in a model or an artifact. Reads headers only.')
    .argument('<model>', 'Hugging Face folder, bare .safetensors file, an artifact that pcomp wrote, or an adapter')
    .option('--groups', 'also the width of every group')
    .option('--tensors', 'also every stored tensor')
    .option('--verify', 'instead, hash the files of an artifact and compare them with its pcomp.json; code 1 if one differs')
    .addOption(jsonOption())
    .action(async (path: string, flags: { groups?: boolean; tensors?: boolean; verify?: boolean; json?: boolean }) => {
      const console = createConsole({ json: flags.json === true, quiet: true, signal });
      if (flags.verify) {
        if (flags.groups || flags.tensors) throw new RecipeError('--verify: goes without --groups and --tensors');
        const verification = await verifyArtifact(path, signal);
        console.result(verification, describeVerification(verification));
        const { files, mismatches } = verification;
        if (mismatches.length === 0) return;
        throw new FormatError(
          path,
          'not-as-written',
          `${mismatches.length} of ${files} files or their tensors differ from pcomp.json`,
        );
      }
      const adapter = await inspectAdapter(path);
      if (adapter) {
        if (flags.groups || flags.tensors)
          throw new RecipeError(`${path}: is an adapter, which --groups and --tensors say nothing of`);
        console.result({ path, ...adapter }, renderAdapter(adapter));
        return;
      }
      const inspection = await inspect(path);
      console.result(inspection, describe(inspection, flags));
    });
}

function describeVerification({ files, bytes, mismatches }: Verification): string {
  return mismatches.length > 0 ? mismatches.join('\n') : `${files} files, ${formatSize(bytes)}: all are as they were written`;
}

function describe(inspection: Inspection, flags: { groups?: boolean; tensors?: boolean }): string {
  const { where, bytes, modules, widths } = inspection;
  const share = (part: number) => `${formatSize(part)} (${((100 * part) / bytes).toFixed(1)} %)`;
  const sections = [
    renderPairs([
      ['model', `${inspection.architecture}, ${inspection.kind === 'float' ? 'not quantized' : `layout ${inspection.kind}`}`],
      ['bits per weight', `${inspection.bitsPerWeight.toFixed(4)} stored, ${inspection.averageBits.toFixed(4)} code bits`],
      ['weight files', formatSize(bytes)],
      ['  linear layers', share(where.linears)],
      ['  embeddings, head', share(where.embeddings)],
      ['  norms and others', share(where.other)],
      ['  headers, padding', share(where.headers)],
    ]),
    renderTable(
      ['file', 'size'],
      inspection.files.map((file) => [file.path, formatSize(file.bytes)]),
    ),
  ];
  if (modules.length > 0) {
    const widest = Object.keys(widths);
    const ranked = modules.some(({ rank }) => rank !== undefined);
    const rows = modules.map((module) => [
      module.name,
      `${module.outFeatures} x ${module.inFeatures}`,
      module.groupSize,
      ...widest.map((width) => module.bits.filter((bits) => String(bits) === width).length || ''),
      ...(ranked ? [module.rank ?? ''] : []),
      module.averageBits.toFixed(3),
      module.bitsPerWeight.toFixed(3),
      formatSize(module.bytes),
    ]);
    const heads = widest.map((width) => `${width}-bit`);
    sections.push(
      renderTable(['module', 'shape', 'group', ...heads, ...(ranked ? ['rank'] : []), 'code bits', 'bpw', 'size'], rows),
    );
  }
  if (flags.groups) sections.push(modules.map(groupLine).join('\n'));
  if (flags.tensors) {
    const rows = inspection.tensors.map(({ name, dtype, shape, bytes: size }) => [
      name,
      dtype,
      `[${shape.join(', ')}]`,
      formatSize(size),
    ]);
    sections.push(renderTable(['tensor', 'dtype', 'shape', 'size'], rows));
  }
  return sections.join('\n\n');
}

/** Widths of a module's groups in natural column order, a digit each. */
function groupLine({ name, bits }: InspectedModule): string {
  return `${name}  ${bits.join('')}`;
}
