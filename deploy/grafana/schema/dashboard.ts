// The dashboards of this project in the types of @grafana/schema: which panel types they use, and with which options.
import type {
  Dashboard as GrafanaDashboard,
  DataQuery,
  FieldConfig,
  FieldConfigSource,
  GraphFieldConfig,
  Panel as GrafanaPanel,
  RowPanel as GrafanaRowPanel,
} from '@grafana/schema';
import type { Options as StatOptions } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type { Options as TimeSeriesOptions } from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// The Prometheus plug-in's query; @grafana/schema has only what all data sources share.
interface PromQuery extends DataQuery {
  expr: string;
  legendFormat?: string;
  instant?: boolean;
  range?: boolean;
}

interface TypedFields<Custom> extends Omit<FieldConfigSource, 'defaults'> {
  defaults: Omit<FieldConfig, 'custom'> & { custom?: Custom };
}

interface TypedPanel<Type extends string, Options, Custom>
  extends Omit<GrafanaPanel, 'type' | 'options' | 'fieldConfig' | 'targets'> {
  type: Type;
  title: string;
  options: Options;
  fieldConfig: TypedFields<Custom>;
  targets: PromQuery[];
}

type TimeSeriesPanel = TypedPanel<'timeseries', TimeSeriesOptions, GraphFieldConfig>;
type StatPanel = TypedPanel<'stat', StatOptions, Record<string, never>>;

interface RowPanel extends Omit<GrafanaRowPanel, 'panels'> {
  panels: Array<TimeSeriesPanel | StatPanel>;
}

export interface Dashboard extends Omit<GrafanaDashboard, 'panels'> {
  title: string;
  uid: string;
  panels: Array<TimeSeriesPanel | StatPanel | RowPanel>;
}
