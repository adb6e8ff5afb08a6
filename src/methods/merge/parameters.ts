/** From what a user wrote to the values a method takes: its declared defaults, the preset's, and nothing out of range. */
import { RecipeError } from '../../errors.ts';
import type { Merger, Parameter, Parameters, ParameterValues } from './merger.ts';

/** What was asked for one tensor: text from a command line, or numbers, truth values and text from a file. */
export interface RawParameters {
  /** By parameter; for a parameter with one value per expert, a list in expert order is taken too. */
  readonly shared: Readonly<Record<string, unknown>>;
  /** By expert label, then by parameter: wins over `shared`. */
  readonly byExpert?: Readonly<Record<string, Readonly<Record<string, unknown>>>>;
}

/** What has parameters: a merge method, applied or learned. */
export type Declared<D extends Parameters = Parameters> = Pick<Merger<D>, 'name' | 'parameters'>;

/**
 * Checked values for one tensor.
 * @param experts labels in expert order
 * @throws RecipeError for an unknown parameter, a missing one, a value of the wrong kind or out of range
 */
export function resolveParameters<D extends Parameters>(
  merger: Declared<D>,
  raw: RawParameters,
  experts: readonly string[],
  preset: 'best' | 'paper',
): ParameterValues<D> {
  const shared = known(merger, raw.shared);
  const byExpert = new Map<string, Map<string, unknown>>();
  for (const [label, values] of Object.entries(raw.byExpert ?? {})) {
    if (!experts.includes(label))
      throw new RecipeError(`${Object.keys(values).join(', ')} for expert "${label}": the experts are ${experts.join(', ')}`);
    const own = known(merger, values);
    for (const name of own.keys())
      if (!merger.parameters[name].perExpert)
        throw new RecipeError(`${name} for expert "${label}": ${merger.name} takes one ${name} for all experts`);
    byExpert.set(label, own);
  }
  const resolved = Object.entries<Parameter>(merger.parameters).map(([name, parameter]) => {
    const common = shared.get(name) ?? (preset === 'paper' ? parameter.paper : undefined) ?? parameter.default;
    if (!parameter.perExpert) return [name, value(merger, name, parameter, common)];
    if (Array.isArray(common) && common.length !== experts.length)
      throw new RecipeError(`${name} ${common.join(',')}: ${common.length} values for ${experts.length} experts`);
    const values = experts.map((label, k) => {
      const own = byExpert.get(label)?.get(name) ?? (Array.isArray(common) ? common[k] : common);
      return value(merger, name, parameter, own);
    });
    return [name, values];
  });
  return Object.fromEntries(resolved);
}

/** The given values by declared name. mergekit's spelling, with the method in front (`nuslerp_flatten`), is the same parameter. */
function known(merger: Declared, given: Readonly<Record<string, unknown>>): Map<string, unknown> {
  const prefix = `${snake(merger.name)}_`;
  const result = new Map<string, unknown>();
  for (const [written, raw] of Object.entries(given)) {
    const name = [snake(written), snake(written).replace(prefix, '')].find((key) => Object.hasOwn(merger.parameters, key));
    if (name === undefined) {
      const names = Object.keys(merger.parameters).join(', ') || 'none';
      throw new RecipeError(`${written}: ${merger.name} has no such parameter; it has ${names}`);
    }
    if (result.has(name)) throw new RecipeError(`${written}: ${name} is given twice`);
    if (raw !== undefined) result.set(name, raw);
  }
  return result;
}

function snake(name: string): string {
  return name.replaceAll('-', '_');
}

function value(merger: Declared, name: string, parameter: Parameter, raw: unknown): number | boolean | string {
  if (raw === undefined) throw new RecipeError(`${name}: ${merger.name} needs it (${parameter.summary})`);
  const shown = typeof raw === 'string' ? raw : JSON.stringify(raw);
  const refuse = (rule: string): never => {
    throw new RecipeError(`${name} ${shown}: ${merger.name} takes ${rule}`);
  };
  switch (parameter.type) {
    case 'number': {
      const result = typeof raw === 'string' && raw.trim() !== '' ? Number(raw) : raw;
      if (typeof result !== 'number' || !Number.isFinite(result)) return refuse('a finite number');
      const { above, min, max } = parameter;
      if (parameter.integer && !Number.isInteger(result)) return refuse('a whole number');
      if (above !== undefined && result <= above) return refuse(`a number above ${above}`);
      if (min !== undefined && result < min) return refuse(`a number of at least ${min}`);
      if (max !== undefined && result > max) return refuse(`a number of at most ${max}`);
      return result;
    }
    case 'boolean':
      if (typeof raw === 'boolean') return raw;
      return raw === 'true' || (raw !== 'false' && refuse('true or false'));
    case 'choice': {
      // mergekit has switches where there are more than two ways: on is the default way, off is none.
      const off = parameter.choices.find((choice) => choice === 'none');
      if (off !== undefined && (raw === false || raw === 'false')) return off;
      if (off !== undefined && (raw === true || raw === 'true')) return parameter.default;
      return parameter.choices.find((choice) => choice === raw) ?? refuse(`one of ${parameter.choices.join(', ')}`);
    }
    default:
      throw new Error(`parameter type ${parameter satisfies never}`);
  }
}
