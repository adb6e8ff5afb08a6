/** The statistics a calibrated method cannot do without. */
import type { CalibrationStats } from '../../calibration/statistics.ts';
import type { LinearSite } from '../../model/model.ts';

/** Returns `stats`; throws when the run forgot them or took those of another input, which is a bug, not a user's error. */
export function requireStats(site: LinearSite, stats: CalibrationStats | undefined): CalibrationStats {
  if (!stats) throw new Error(`${site.name}: no calibration statistics`);
  if (stats.features !== site.inFeatures) {
    throw new Error(`${site.name}: statistics of ${stats.features} features for ${site.inFeatures} columns`);
  }
  return stats;
}
