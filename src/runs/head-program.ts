/** Gradients through the output head of a model that is not learned: its norm and head are read once. */
import type { Engine, NdArray, Program } from '../compute/engine.ts';
import type { HeadObjective, Model, WeightReader } from '../model/model.ts';

export interface HeadProgram {
  readonly program: Program;
  /** What is fed to it besides states and what they are compared with. */
  readonly fixed: Readonly<Record<string, NdArray>>;
}

/** @param rows states of a run */
export async function openHeadProgram(
  model: Model,
  engine: Engine,
  weights: WeightReader,
  rows: number,
  objective: HeadObjective,
): Promise<HeadProgram> {
  const { hiddenSize, vocabSize } = model.shape;
  const { model: graph, key, weights: norm } = model.headGradient(rows, objective);
  const program = await engine.compile(graph, { key });
  const head: NdArray = { dtype: 'F32', shape: [vocabSize, hiddenSize], data: await weights.load(model.outputHead) };
  const fixed: Record<string, NdArray> = { head };
  for (const [input, name] of norm) {
    const data = await weights.load(name);
    fixed[input] = { dtype: 'F32', shape: [data.length], data };
  }
  return { program, fixed };
}
