/** The `__metadata__` of a file in the `planes` layout: which modules it holds, and how their columns are grouped. */
import { FormatError } from '../errors.ts';
import type { PlanesModule } from './planes.ts';

/** A module of the file; `input` names the first module that reads the same activation. */
export interface PlanesEntry extends PlanesModule {
  readonly input: string;
}

/** Strings to store: deterministic, in the order of `modules`. A module whose group size is not `groupSize` says so itself. */
export function planesMetadata(groupSize: number, modules: ReadonlyMap<string, PlanesEntry>): Map<string, string> {
  const inputs = new Set<string>();
  const quant = {
    group_size: groupSize,
    modules: Object.fromEntries(
      [...modules].map(([name, entry]) => {
        inputs.add(entry.input);
        const own = entry.groupSize === groupSize ? {} : { group_size: entry.groupSize };
        return [name, { shape: [entry.outFeatures, entry.inFeatures], input: entry.input, ...own }];
      }),
    ),
    inputs: Object.fromEntries([...inputs].map((input) => [input, { transform: 'none', block: groupSize, folded: false }])),
  };
  return new Map([
    ['format', 'pt'],
    ['pcomp.layout', 'planes'],
    ['pcomp.layout_version', '1'],
    ['pcomp.quant', JSON.stringify(quant)],
  ]);
}

/** Whether a file says it is in the `planes` layout. */
export function isPlanes(metadata: ReadonlyMap<string, string>): boolean {
  return metadata.get('pcomp.layout') === 'planes';
}

/** Modules of a file in the layout. Throws FormatError on another version, a transform this version does not know, or malformed JSON. */
export function parsePlanesMetadata(path: string, metadata: ReadonlyMap<string, string>): Map<string, PlanesEntry> {
  const version = metadata.get('pcomp.layout_version');
  if (version !== '1')
    throw new FormatError(path, 'planes-version', `layout version is ${version ?? 'missing'}, pcomp reads version 1`);
  const quant = parseJson(path, metadata.get('pcomp.quant'));
  const fail = (detail: string) => new FormatError(path, 'planes-metadata', `pcomp.quant: ${detail}`);
  if (!isRecord(quant) || !isRecord(quant.modules) || !isRecord(quant.inputs)) throw fail('needs objects "modules" and "inputs"');
  for (const [input, value] of Object.entries(quant.inputs)) {
    if (!isRecord(value) || value.transform !== 'none') {
      throw new FormatError(
        path,
        'planes-transform',
        `input "${input}" has a transform that is not "none", the only one pcomp reads`,
      );
    }
  }
  const modules = new Map<string, PlanesEntry>();
  for (const [name, value] of Object.entries(quant.modules)) {
    if (!isRecord(value) || !Array.isArray(value.shape) || value.shape.length !== 2 || !value.shape.every(isPositive)) {
      throw fail(`module "${name}" needs a shape of two positive integers`);
    }
    const groupSize = value.group_size ?? quant.group_size;
    if (!isPositive(groupSize)) throw fail(`module "${name}" has no positive group_size`);
    if (typeof value.input !== 'string') throw fail(`module "${name}" names no input`);
    modules.set(name, { outFeatures: value.shape[0], inFeatures: value.shape[1], groupSize, input: value.input });
  }
  return modules;
}

function parseJson(path: string, text: string | undefined): unknown {
  try {
    return JSON.parse(text ?? 'null');
  } catch (cause) {
    throw new FormatError(path, 'planes-metadata', 'pcomp.quant is not JSON', { cause });
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isPositive(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) > 0;
}
