/** A survey as plain JSON, bit for bit: it takes a pass over the model, and a resumed search must go on from the same one. */
import type { PartDetails } from '../../artifacts/parts.ts';
import type { TransformCosts } from '../../methods/quantize/quantizer.ts';
import type { Model } from '../../model/model.ts';
import type { ModelSurvey } from './survey.ts';

interface RecordedSite {
  readonly name: string;
  readonly energy: number;
  readonly widths: number;
  /** Costs group by group: base64 of little-endian float64, since JSON has no Infinity. */
  readonly costs: string;
}

interface RecordedSurvey {
  readonly inputs: readonly {
    readonly input: string;
    readonly transforms: readonly (Pick<TransformCosts, 'transform' | 'free' | 'groupSize'> & {
      readonly sites: readonly RecordedSite[];
    })[];
  }[];
  readonly sensitivities: Readonly<Record<string, number>>;
}

export function recordSurvey({ inputs, sensitivities }: ModelSurvey): PartDetails {
  const record: RecordedSurvey = {
    inputs: inputs.map(({ input, survey }) => ({
      input,
      transforms: survey.transforms.map(({ transform, free, groupSize, sites }) => ({
        transform,
        free,
        groupSize,
        sites: sites.map(({ site, energy, costs }) => ({
          name: site.name,
          energy,
          widths: costs[0].length,
          costs: Buffer.from(Float64Array.from(costs.flatMap((row) => [...row])).buffer).toString('base64'),
        })),
      })),
    })),
    sensitivities: Object.fromEntries(sensitivities),
  };
  return record as unknown as PartDetails;
}

/** The reverse; `model` is the one that was surveyed. Trials are not part of it. */
export function readSurvey(details: PartDetails, model: Model): ModelSurvey {
  const { inputs, sensitivities } = details as unknown as RecordedSurvey;
  const known = new Map(model.blocks.flatMap(({ sites }) => sites.map((site) => [site.name, site] as const)));
  return {
    inputs: inputs.map(({ input, transforms }) => ({
      input,
      survey: {
        transforms: transforms.map(({ transform, free, groupSize, sites }) => ({
          transform,
          free,
          groupSize,
          sites: sites.map(({ name, energy, widths, costs }) => ({
            site: known.get(name)!,
            energy,
            costs: rowsOf(costs, widths),
          })),
        })),
        trials: new Map(),
      },
    })),
    sensitivities: new Map(Object.entries(sensitivities)),
  };
}

function rowsOf(base64: string, width: number): Float64Array[] {
  const bytes = Uint8Array.from(Buffer.from(base64, 'base64'));
  const all = new Float64Array(bytes.buffer);
  return Array.from({ length: all.length / width }, (_, g) => all.slice(g * width, (g + 1) * width));
}
