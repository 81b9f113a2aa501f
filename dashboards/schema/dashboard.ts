// Grafana's types, for JSON: enumerations as the values they stand for, and what each kind of panel and query holds.
import type { Dashboard, Panel, RowPanel } from '@grafana/schema/dist/esm/raw/dashboard/x/dashboard_types.gen.d.ts';
import type { DataQuery } from '@grafana/schema/dist/esm/index.d.ts';
import type * as heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen.d.ts';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts';
import type * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts';

// An enumeration's member is assignable from its value only as text.
type Json<T> = T extends string
  ? `${T}`
  : T extends number
    ? `${T}` extends `${infer N extends number}` ? N : number
    : T extends (infer E)[]
      ? Json<E>[]
      : T extends object
        ? { [K in keyof T]: Json<T[K]> }
        : T;

type Query = DataQuery & {
  expr: string;
  format: 'time_series' | 'table' | 'heatmap';
  instant?: boolean;
  range?: boolean;
  legendFormat?: string;
};

type Of<Type extends string, Options, Custom = never> = Omit<Panel, 'type' | 'options' | 'fieldConfig' | 'targets'> & {
  type: Type;
  title: string;
  description: string;
  options: Options;
  targets: Query[];
  fieldConfig: Omit<Panel['fieldConfig'] & object, 'defaults'> & {
    defaults: Omit<NonNullable<Panel['fieldConfig']>['defaults'], 'custom'> & { unit: string; custom?: Custom };
  };
};

type OurPanel =
  | Of<'timeseries', timeseries.Options, timeseries.FieldConfig>
  | Of<'heatmap', heatmap.Options, heatmap.FieldConfig>
  | Of<'stat', stat.Options>;

export type OurDashboard = Json<
  Omit<Dashboard, 'panels'> & { panels: (OurPanel | (Omit<RowPanel, 'panels'> & { panels: OurPanel[] }))[] }
>;
